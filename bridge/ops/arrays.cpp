#include "arrays.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace heedful {
namespace {

/* Whether the dimension `outer` lies outside `inner` in torch's order, which keeps dimensions with a stride of 0 where
 * they are. */
bool swapped(const heedful_array &array, int64_t inner, int64_t outer) {
    const int64_t a = array.stride[inner], b = array.stride[outer];
    return a != 0 && b != 0 && (a > b || (a == b && array.size[inner] > array.size[outer]));
}
bool in_order(const heedful_array &array, int64_t inner, int64_t outer) {
    const int64_t a = array.stride[inner], b = array.stride[outer];
    return a != 0 && b != 0 && a < b;
}

bool dense(const heedful_array &array) {
    std::vector<int32_t> order;
    for (int32_t dim = 0; dim < array.ndim; ++dim)
        if (array.size[dim] != 1) order.push_back(dim);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return array.stride[a] < array.stride[b]; });
    int64_t expected = 1;
    for (const int32_t dim : order) {
        if (array.size[dim] == 0) return true;
        if (array.stride[dim] != expected) return false;
        expected *= array.size[dim];
    }
    return true;
}

} // namespace

heedful_array array(const Tensor &tensor, const char *name) {
    heedful_array result;
    int64_t ndim = 0;
    int64_t *sizes = nullptr, *strides = nullptr;
    result.dtype = dtype_on_cpu(tensor, name);
    const void *data = nullptr;
    if (aoti_torch_get_dim(tensor.get(), &ndim) != 0 || aoti_torch_get_sizes(tensor.get(), &sizes) != 0 ||
        aoti_torch_get_strides(tensor.get(), &strides) != 0 || torch_get_const_data_ptr(tensor.get(), &data) != 0)
        fail(std::string(name) + ": torch could not give its sizes, strides and data");
    result.data = const_cast<void *>(data);
    result.ndim = static_cast<int32_t>(ndim);
    result.size = sizes;
    result.stride = strides;
    return result;
}

heedful_array optional_array(const Tensor &tensor, const char *name) {
    if (tensor.get() != nullptr) return array(tensor, name);
    heedful_array absent = {};
    return absent;
}

Tensor empty_like(const heedful_array &array) {
    const int64_t ndim = array.ndim;
    bool contiguous = true;
    int64_t expected = 1;
    for (int64_t dim = ndim - 1; contiguous && dim >= 0; --dim) {
        contiguous = array.size[dim] == 1 || array.stride[dim] == expected;
        expected *= array.size[dim];
    }
    const heedful_dtype dtype = static_cast<heedful_dtype>(array.dtype);
    if (contiguous) return Tensor::empty(ndim, array.size, array.stride, dtype);
    if (dense(array)) return Tensor::empty(ndim, array.size, array.stride, dtype);
    std::vector<int64_t> order(static_cast<size_t>(ndim)), strides(static_cast<size_t>(ndim));
    std::iota(order.rbegin(), order.rend(), 0);
    for (int64_t i = 1; i < ndim; ++i) {
        int64_t at = i;
        for (int64_t before = i - 1; before >= 0; --before) {
            if (swapped(array, order[before], order[at])) {
                std::swap(order[before], order[at]);
                at = before;
            } else if (in_order(array, order[before], order[at])) {
                break;
            }
        }
    }
    int64_t stride = 1;
    for (const int64_t dim : order) {
        strides[dim] = stride;
        stride *= std::max<int64_t>(array.size[dim], 1);
    }
    return Tensor::empty(ndim, array.size, strides.data(), dtype);
}

Tensor empty(int64_t ndim, const int64_t *sizes, heedful_dtype dtype) {
    int64_t strides[64], stride = 1;
    for (int64_t dim = ndim - 1; dim >= 0; --dim) {
        strides[dim] = stride;
        stride *= std::max<int64_t>(sizes[dim], 1);
    }
    return Tensor::empty(ndim, sizes, strides, dtype);
}

Tensor empty(std::initializer_list<int64_t> sizes, heedful_dtype dtype) {
    return empty(static_cast<int64_t>(sizes.size()), sizes.begin(), dtype);
}

} // namespace heedful
