/* Cross entropy of rows of logits, whole or a part of the classes at a time. */
#ifndef HEEDFUL_OPS_CROSS_ENTROPY_H
#define HEEDFUL_OPS_CROSS_ENTROPY_H

#include "array.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Of n rows and all of `classes` classes, of which a call sees those from `first` on, as many as logits has columns.
 *
 * With s the logits, after softcap * tanh(logits / softcap) where softcap is positive, and e = smoothing, a row's loss
 * is lse - (1 - e) s[target] - e mean(s), lse being log(sum(e^s)); 0 where target is ignore_index. */
typedef struct heedful_cross_entropy_terms {
    int64_t first, classes;
    int64_t ignore_index;
    double smoothing; /* 0 to 1 */
    double softcap;   /* 0 for none */
} heedful_cross_entropy_terms;

/* logits (n, c) and targets (n), INT64, 0 to classes - 1 or ignore_index. losses and lse: (n), contiguous, FLOAT32
 * (FLOAT64 for FLOAT64), written by the call that sees the last class. statistics: (n, 4), contiguous, FLOAT64, what
 * one call leaves to the next; NULL or without data where one call sees all classes. Calls begin at class 0 and go on
 * where the one before ended. */
HEEDFUL_API heedful_status heedful_cross_entropy(const heedful_array *logits, const heedful_array *targets,
                                                 const heedful_cross_entropy_terms *terms,
                                                 const heedful_array *statistics, const heedful_array *losses,
                                                 const heedful_array *lse, const heedful_threads *threads);

/* grad_logits as logits, and may be logits itself. lse as above; grad_losses and grad_lse, (n), are of its dtype;
 * grad_lse, or none, without data. */
HEEDFUL_API heedful_status heedful_cross_entropy_backward(const heedful_array *grad_losses,
                                                          const heedful_array *grad_lse, const heedful_array *logits,
                                                          const heedful_array *targets,
                                                          const heedful_cross_entropy_terms *terms,
                                                          const heedful_array *lse, const heedful_array *grad_logits,
                                                          const heedful_threads *threads);

#ifdef __cplusplus
}
#endif
#endif
