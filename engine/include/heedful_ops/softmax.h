/* Softmax of rows with what attention does to its scores before: s = x * scale; then softcap * tanh(s / softcap); then
 * the mask; out = exp(s) / sum(exp(s)). A row whose s are all -inf gives 0. */
#ifndef HEEDFUL_OPS_SOFTMAX_H
#define HEEDFUL_OPS_SOFTMAX_H

#include "array.h"

#ifdef __cplusplus
extern "C" {
#endif

/* x and out of one shape and dtype, a row being the last dimension; out may be x itself. softcap: 0 for none. mask, or
 * none: of as many dimensions as x or fewer, the last ones, each of x's size or 1; BOOL, where false takes an element
 * out, or of x's dtype or FLOAT32 (FLOAT64 for FLOAT64), which is added. */
HEEDFUL_API heedful_status heedful_softmax(const heedful_array *x, const heedful_array *mask, double scale,
                                           double softcap, const heedful_array *out, const heedful_threads *threads);

/* grad_x, grad_out and out, which the forward gave, as x. x may be none where there is no softcap. grad_scores, or
 * none: as x and FLOAT32 (FLOAT64 for FLOAT64), the gradient of s after the mask. */
HEEDFUL_API heedful_status heedful_softmax_backward(const heedful_array *grad_out, const heedful_array *out,
                                                    const heedful_array *x, double scale, double softcap,
                                                    const heedful_array *grad_x, const heedful_array *grad_scores,
                                                    const heedful_threads *threads);

#ifdef __cplusplus
}
#endif
#endif
