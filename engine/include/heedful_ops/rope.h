/* Rotary position embeddings: pairs of a row's elements turned by an angle each. */
#ifndef HEEDFUL_OPS_ROPE_H
#define HEEDFUL_OPS_ROPE_H

#include "array.h"

#ifdef __cplusplus
extern "C" {
#endif

/* x and out: (..., D), of one shape and dtype; out may be x itself. cos and sin are of one shape, and of x's dtype or
 * FLOAT32 (FLOAT64 for FLOAT64). R, their last size, is at most D / 2: a row's first 2 R elements turn, the others
 * stay.
 *
 * positions NULL or without data: cos and sin broadcast to (..., R), with x's leading sizes. Otherwise they are (P, R),
 * and positions, INT32 or INT64 from 0 to P - 1, broadcasts to x's leading sizes and says which row is whose.
 *
 * With a and b the elements r and R + r, or where interleaved 2 r and 2 r + 1, out has a cos - b sin and b cos + a sin.
 * Where inverse, the angle is taken negatively: the gradient of x, given that of out. */
HEEDFUL_API heedful_status heedful_rope(const heedful_array *x, const heedful_array *cos, const heedful_array *sin,
                                        const heedful_array *positions, int32_t interleaved, int32_t inverse,
                                        const heedful_array *out, const heedful_threads *threads);

#ifdef __cplusplus
}
#endif
#endif
