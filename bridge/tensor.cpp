#include "tensor.h"

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
    fail(std::string(name) + " must be float32, bfloat16, float16, float64, int32 or bool");
}

int32_t torch_dtype(heedful_dtype dtype) {
    for (const DtypePair &pair : dtypes)
        if (pair.engine == dtype) return pair.torch;
    fail("heedful: no torch dtype for the engine's dtype " + std::to_string(dtype));
}

/* Everything but the data. */
heedful_tensor describe(AtenTensorHandle tensor, const char *name) {
    heedful_tensor result;
    int32_t device = 0;
    check(aoti_torch_get_device_type(tensor, &device), name, "device");
    if (device != cpu) fail(std::string(name) + " must be on the CPU");
    int64_t ndim = 0;
    int64_t *sizes = nullptr;
    int64_t *strides = nullptr;
    check(aoti_torch_get_dim(tensor, &ndim), name, "rank");
    check(aoti_torch_get_sizes(tensor, &sizes), name, "sizes");
    check(aoti_torch_get_strides(tensor, &strides), name, "strides");
    if (ndim > 4) fail(std::string(name) + " has " + std::to_string(ndim) + " dimensions, and at most 4 are taken");
    result.dtype = engine_dtype(tensor, name);
    result.ndim = ndim == 0 ? 1 : static_cast<int32_t>(ndim);
    result.size[0] = result.stride[0] = 1;
    for (int64_t dim = 0; dim < ndim; ++dim) {
        result.size[dim] = sizes[dim];
        result.stride[dim] = strides[dim];
    }
    return result;
}

} // namespace

void fail(const std::string &message) {
    aoti_torch_check(false, "heedful", __FILE__, __LINE__, message.c_str());
    __builtin_unreachable();
}

Tensor Tensor::empty(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                     heedful_dtype dtype) {
    AtenTensorHandle handle = nullptr;
    if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), torch_dtype(dtype),
                                 cpu, 0, &handle) != 0)
        fail("heedful: torch could not allocate the output");
    return Tensor(reinterpret_cast<StableIValue>(handle));
}

heedful_tensor view(const Tensor &tensor, const char *name) {
    heedful_tensor result = describe(tensor.get(), name);
    const void *data = nullptr;
    check(torch_get_const_data_ptr(tensor.get(), &data), name, "data");
    result.data = const_cast<void *>(data);
    return result;
}

heedful_tensor writable_view(const Tensor &tensor, const char *name) {
    heedful_tensor result = describe(tensor.get(), name);
    check(torch_get_mutable_data_ptr(tensor.get(), &result.data), name, "data");
    return result;
}

} // namespace heedful
