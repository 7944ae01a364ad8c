/* Root-mean-square norm of rows, alone and of a residual stream: out = x / sqrt(mean(x^2) + eps) * weight. */
#ifndef HEEDFUL_OPS_RMS_NORM_H
#define HEEDFUL_OPS_RMS_NORM_H

#include "array.h"

#ifdef __cplusplus
extern "C" {
#endif

/* x and out of one shape and dtype, the mean being over the last dimension; out may be x itself. weight, or none: (size
 * of that dimension), of x's dtype, or FLOAT32 (FLOAT64 for FLOAT64). */
HEEDFUL_API heedful_status heedful_rms_norm(const heedful_array *x, const heedful_array *weight, double eps,
                                            const heedful_array *out, const heedful_threads *threads);

/* sum = x + residual, rounded to its dtype, and out the norm of that; all of x's shape and dtype. sum may be x or
 * residual itself. */
HEEDFUL_API heedful_status heedful_add_rms_norm(const heedful_array *x, const heedful_array *residual,
                                                const heedful_array *weight, double eps, const heedful_array *out,
                                                const heedful_array *sum, const heedful_threads *threads);

/* grad_x and grad_out as x. added, or none: as x, what else arrives at x, which is added to grad_x. grad_weight, or
 * none: contiguous (size of the last dimension), FLOAT32 (FLOAT64 for FLOAT64). */
HEEDFUL_API heedful_status heedful_rms_norm_backward(const heedful_array *grad_out, const heedful_array *added,
                                                     const heedful_array *x, const heedful_array *weight, double eps,
                                                     const heedful_array *grad_x, const heedful_array *grad_weight,
                                                     const heedful_threads *threads);

#ifdef __cplusplus
}
#endif
#endif
