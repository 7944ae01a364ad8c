/* Swish with a steepness: out = x * sigmoid(beta * x). */
#ifndef HEEDFUL_OPS_PARAMETRIC_SWISH_H
#define HEEDFUL_OPS_PARAMETRIC_SWISH_H

#include "array.h"

#ifdef __cplusplus
extern "C" {
#endif

/* x and out of one shape and dtype; out may be x itself. betas, or none: (size of x's dimension `dim`), or one element,
 * which then take beta's place; of x's dtype, or FLOAT32 (FLOAT64 for FLOAT64). dim counts from the front. */
HEEDFUL_API heedful_status heedful_parametric_swish(const heedful_array *x, const heedful_array *betas, double beta,
                                                    int32_t dim, const heedful_array *out,
                                                    const heedful_threads *threads);

/* grad_x and grad_out as x; grad_betas, or none: contiguous, as many elements as betas has and 1 where there is none,
 * FLOAT32 (FLOAT64 for FLOAT64). grad_x may be grad_out itself. */
HEEDFUL_API heedful_status heedful_parametric_swish_backward(const heedful_array *grad_out, const heedful_array *x,
                                                             const heedful_array *betas, double beta, int32_t dim,
                                                             const heedful_array *grad_x,
                                                             const heedful_array *grad_betas,
                                                             const heedful_threads *threads);

#ifdef __cplusplus
}
#endif
#endif
