/* Layer norm of rows, then GELU: z = (x - mean) / sqrt(variance + eps) * weight + bias, out = z * Phi(z). */
#ifndef HEEDFUL_OPS_LAYER_NORM_GELU_H
#define HEEDFUL_OPS_LAYER_NORM_GELU_H

#include "array.h"

#ifdef __cplusplus
extern "C" {
#endif

/* x and out of one shape and dtype, the statistics being over the last dimension; out may be x itself. weight and bias,
 * each or none: (size of that dimension), of x's dtype, or FLOAT32 (FLOAT64 for FLOAT64). tanh: whether Phi is taken by
 * its approximation (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2. */
HEEDFUL_API heedful_status heedful_layer_norm_gelu(const heedful_array *x, const heedful_array *weight,
                                                   const heedful_array *bias, double eps, int32_t tanh,
                                                   const heedful_array *out, const heedful_threads *threads);

/* grad_x and grad_out as x. grad_weight and grad_bias, both or none: contiguous (size of the last dimension), FLOAT32
 * (FLOAT64 for FLOAT64). */
HEEDFUL_API heedful_status heedful_layer_norm_gelu_backward(const heedful_array *grad_out, const heedful_array *x,
                                                            const heedful_array *weight, const heedful_array *bias,
                                                            double eps, int32_t tanh, const heedful_array *grad_x,
                                                            const heedful_array *grad_weight,
                                                            const heedful_array *grad_bias,
                                                            const heedful_threads *threads);

#ifdef __cplusplus
}
#endif
#endif
