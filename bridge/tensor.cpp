#include "tensor.h"

#include <algorithm>

#include <sys/mman.h>

namespace heedful {
namespace {

struct DtypePair {
    int32_t torch;
    heedful_dtype engine;
};

/* libtorch gives its dtype codes only at run time. */
const DtypePair dtypes[] = {
    {aoti_torch_dtype_float32(), HEEDFUL_FLOAT32}, {aoti_torch_dtype_bfloat16(), HEEDFUL_BFLOAT16},
    {aoti_torch_dtype_float16(), HEEDFUL_FLOAT16}, {aoti_torch_dtype_float64(), HEEDFUL_FLOAT64},
    {aoti_torch_dtype_int32(), HEEDFUL_INT32},     {aoti_torch_dtype_bool(), HEEDFUL_BOOL},
    {aoti_torch_dtype_int64(), HEEDFUL_INT64},
};
const int32_t cpu = aoti_torch_device_type_cpu();

void check(AOTITorchError error, const char *name, const char *what) {
    if (error != 0) fail(std::string(name) + ": torch could not give its " + what);
}

heedful_dtype engine_dtype(AtenTensorHandle tensor, const char *name) {
    int32_t code = 0;
    check(aoti_torch_get_dtype(tensor, &code), name, "dtype");
    for (const DtypePair &pair : dtypes)
        if (pair.torch == code) return pair.engine;
    fail(std::string(name) + " must be float32, bfloat16, float16, float64, int32, int64 or bool");
}

/* From here on malloc maps fresh memory for every block, whose pages are faulted in while they are written: 4 KiB at a
 * time that takes longer than most operations. What it keeps for itself has its pages, and is left alone. */
constexpr uintptr_t FRESH_BYTES = uintptr_t(32) << 20, HUGE_PAGE = uintptr_t(2) << 20;

void ask_for_huge_pages(const void *data, uintptr_t bytes) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE,
                    end = (reinterpret_cast<uintptr_t>(data) + bytes) / HUGE_PAGE * HUGE_PAGE;
    /* A wish: where the kernel refuses, nothing is lost. */
    madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
}

} // namespace

void fail(const std::string &message) {
    aoti_torch_check(false, "heedful", __FILE__, __LINE__, message.c_str());
    __builtin_unreachable();
}

int32_t torch_dtype(heedful_dtype dtype) {
    for (const DtypePair &pair : dtypes)
        if (pair.engine == dtype) return pair.torch;
    fail("heedful: no torch dtype for the engine's dtype " + std::to_string(dtype));
}

Tensor Tensor::optional(StableIValue value) {
    StableIValue *const given = reinterpret_cast<StableIValue *>(value);
    Tensor result(given == nullptr ? 0 : *given);
    delete given;
    return result;
}

Tensor Tensor::empty(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, heedful_dtype dtype,
                     heedful_tensor &view) {
    Tensor result = empty(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), dtype);
    check(torch_get_mutable_data_ptr(result.get(), &view.data), "heedful: an output", "data");
    view.dtype = dtype;
    view.ndim = static_cast<int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), view.size);
    std::copy(strides.begin(), strides.end(), view.stride);
    return result;
}

Tensor Tensor::empty(int64_t ndim, const int64_t *sizes, const int64_t *strides, heedful_dtype dtype) {
    AtenTensorHandle handle = nullptr;
    if (aoti_torch_empty_strided(ndim, sizes, strides, torch_dtype(dtype), cpu, 0, &handle) != 0)
        fail("heedful: torch could not allocate an output");
    Tensor result(reinterpret_cast<StableIValue>(handle));
    uintptr_t bytes = dtype == HEEDFUL_FLOAT64 || dtype == HEEDFUL_INT64   ? 8
                      : dtype == HEEDFUL_FLOAT32 || dtype == HEEDFUL_INT32 ? 4
                      : dtype == HEEDFUL_BOOL                              ? 1
                                                                           : 2;
    for (int64_t dim = 0; dim < ndim; ++dim) bytes *= static_cast<uintptr_t>(sizes[dim]);
    if (bytes >= FRESH_BYTES) {
        const void *data = nullptr;
        check(torch_get_const_data_ptr(handle, &data), "heedful: an output", "data");
        ask_for_huge_pages(data, bytes);
    }
    return result;
}

heedful_dtype dtype_on_cpu(const Tensor &tensor, const char *name) {
    int32_t device = 0;
    check(aoti_torch_get_device_type(tensor.get(), &device), name, "device");
    if (device != cpu) fail(std::string(name) + " must be on the CPU");
    return engine_dtype(tensor.get(), name);
}

heedful_tensor view(const Tensor &tensor, const char *name) {
    const AtenTensorHandle handle = tensor.get();
    heedful_tensor result;
    result.dtype = dtype_on_cpu(tensor, name);
    int64_t ndim = 0;
    int64_t *sizes = nullptr;
    int64_t *strides = nullptr;
    check(aoti_torch_get_dim(handle, &ndim), name, "rank");
    check(aoti_torch_get_sizes(handle, &sizes), name, "sizes");
    check(aoti_torch_get_strides(handle, &strides), name, "strides");
    if (ndim > 4) fail(std::string(name) + " has " + std::to_string(ndim) + " dimensions, and at most 4 are taken");
    result.ndim = ndim == 0 ? 1 : static_cast<int32_t>(ndim);
    result.size[0] = result.stride[0] = 1;
    for (int64_t dim = 0; dim < ndim; ++dim) {
        result.size[dim] = sizes[dim];
        result.stride[dim] = strides[dim];
    }
    const void *data = nullptr;
    check(torch_get_const_data_ptr(handle, &data), name, "data");
    result.data = const_cast<void *>(data);
    return result;
}

} // namespace heedful
