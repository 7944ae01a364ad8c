/* Torch's tensors as the engine's fused operations see them, and outputs as torch allocates them. */
#ifndef HEEDFUL_BRIDGE_OPS_ARRAYS_H
#define HEEDFUL_BRIDGE_OPS_ARRAYS_H

#include "arguments.h"
#include "heedful_ops/array.h"
#include "operator.h"
#include "tensor.h"
#include "threads.h"

namespace heedful {

/* A strided CPU tensor of any rank; fails by name on any other. Refers to the tensor's own sizes and strides. */
heedful_array array(const Tensor &tensor, const char *name);
/* The same, or one whose data is NULL for a tensor that is absent. */
heedful_array optional_array(const Tensor &tensor, const char *name);

/* Uninitialised, with the strides of torch.empty_like: the given tensor's own where it is dense, otherwise dense ones
 * in the same order. */
Tensor empty_like(const heedful_array &array);
/* Uninitialised and contiguous. */
Tensor empty(std::initializer_list<int64_t> sizes, heedful_dtype dtype);
Tensor empty(int64_t ndim, const int64_t *sizes, heedful_dtype dtype);

/* What a type is computed in: float64 for itself, float32 for the others. */
inline heedful_dtype computed_dtype(int32_t dtype) {
    return dtype == HEEDFUL_FLOAT64 ? HEEDFUL_FLOAT64 : HEEDFUL_FLOAT32;
}

} // namespace heedful

#endif
