/* sums = the sum over each row of a * b: what the gradient of a softmax needs of its result and of what arrives. */
#ifndef HEEDFUL_OPS_ROW_PRODUCTS_H
#define HEEDFUL_OPS_ROW_PRODUCTS_H

#include "array.h"

#ifdef __cplusplus
extern "C" {
#endif

/* a and b of one shape and dtype, a row being the last dimension, of which there is one; sums of a's shape without it,
 * contiguous and FLOAT32 (FLOAT64 for FLOAT64). */
HEEDFUL_API heedful_status heedful_row_products(const heedful_array *a, const heedful_array *b,
                                                const heedful_array *sums, const heedful_threads *threads);

#ifdef __cplusplus
}
#endif
#endif
