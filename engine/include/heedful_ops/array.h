/* What the fused operations of heedful_ops/ have in common. Statuses, error messages and threads are those of
 * heedful.h, and what it says of functions holds here: none throws, none keeps a pointer, any may be called from
 * several threads.
 *
 * An operation computes in float32 for FLOAT32, BFLOAT16 and FLOAT16 and in float64 for FLOAT64, and rounds once, where
 * it writes. Results are the same bits for any number of threads. */
#ifndef HEEDFUL_OPS_ARRAY_H
#define HEEDFUL_OPS_ARRAY_H

#include "../heedful.h"

/* A view of memory that the caller owns, of any number of dimensions. Strides count elements and may be 0 (broadcast)
 * or negative; those of an array that is written to keep its elements apart. Where a call takes an array or none, NULL
 * data is none. */
typedef struct heedful_array {
    void *data;
    int32_t dtype; /* heedful_dtype */
    int32_t ndim;
    const int64_t *size, *stride; /* ndim numbers each */
} heedful_array;

#endif
