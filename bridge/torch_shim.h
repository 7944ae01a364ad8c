/* The part of libtorch's C shim that the bridge calls, declared by hand.
 *
 * PyTorch keeps these functions stable from one release to the next, so one build of the bridge serves every
 * torch from TORCH_SHIM_VERSION up, and building it needs no torch. tests/test_build.py compiles this file
 * beside PyTorch's own headers: a declaration that drifts, or that 2.11 does not have, fails there. */
#ifndef HEEDFUL_BRIDGE_TORCH_SHIM_H
#define HEEDFUL_BRIDGE_TORCH_SHIM_H

#include <stddef.h>
#include <stdint.h>

/* The release whose shim this file describes, as libtorch packs it: major, minor. */
#define TORCH_SHIM_VERSION ((UINT64_C(2) << 56) | (UINT64_C(11) << 48))

struct AtenTensorOpaque;
struct StableListOpaque;
class TorchLibraryOpaque;
using AtenTensorHandle = AtenTensorOpaque *;
using StableListHandle = StableListOpaque *;
using TorchLibraryHandle = TorchLibraryOpaque *;

/* One argument or result of an operator: the value's bytes, or a handle that whoever takes it owns. An optional one is
 * null or points to the value, in memory of operator new that whoever takes it frees. */
using StableIValue = uint64_t;
/* 0 on success. libtorch has then caught its exception and logged its text. */
using AOTITorchError = int32_t;
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void *context);

extern "C" {
AOTITorchError aoti_torch_library_init_def(const char *ns, const char *file, uint32_t line, TorchLibraryHandle *result);
AOTITorchError aoti_torch_library_init_impl(const char *ns, const char *key, const char *file, uint32_t line,
                                            TorchLibraryHandle *result);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle library, const char *schema);
AOTITorchError torch_library_impl(TorchLibraryHandle library, const char *name,
                                  void (*kernel)(StableIValue *, uint64_t, uint64_t), uint64_t build_version);
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle library);
AOTITorchError torch_call_dispatcher(const char *name, const char *overload, StableIValue *stack,
                                     uint64_t build_version);

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_bool();

AOTITorchError aoti_torch_is_defined(AtenTensorHandle tensor, bool *result);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t *result);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t *result);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t *result);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t *result);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t **borrowed);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t **borrowed);
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void **borrowed);
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void **borrowed);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t *sizes, const int64_t *strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle *result);
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle *result);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);

AOTITorchError torch_new_list_reserve_size(size_t size, StableListHandle *result);
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue element);
AOTITorchError torch_list_size(StableListHandle list, size_t *result);
AOTITorchError torch_list_get_item(StableListHandle list, size_t index, StableIValue *element);
AOTITorchError torch_delete_list(StableListHandle list);

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc body, void *context);
AOTITorchError torch_get_num_threads(uint32_t *result);

/* Throws libtorch's own error, which Python sees as a RuntimeError, where the condition is false. */
void aoti_torch_check(bool condition, const char *function, const char *file, uint32_t line, const char *message);
}

#endif
