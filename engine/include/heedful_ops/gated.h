/* Gated linear units: out = activation(gate) * up. */
#ifndef HEEDFUL_OPS_GATED_H
#define HEEDFUL_OPS_GATED_H

#include "array.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum heedful_activation {
    HEEDFUL_SILU = 0,      /* x / (1 + e^-x) */
    HEEDFUL_GELU = 1,      /* x (1 + erf(x / sqrt(2))) / 2 */
    HEEDFUL_GELU_TANH = 2, /* x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 */
} heedful_activation;

/* gate, up and out of one shape and dtype; out may be gate or up itself. The halves of one array are arrays with its
 * strides. */
HEEDFUL_API heedful_status heedful_gated(const heedful_array *gate, const heedful_array *up, int32_t activation,
                                         const heedful_array *out, const heedful_threads *threads);

/* All as gate. grad_gate and grad_up may be any of the three that are read. */
HEEDFUL_API heedful_status heedful_gated_backward(const heedful_array *grad_out, const heedful_array *gate,
                                                  const heedful_array *up, int32_t activation,
                                                  const heedful_array *grad_gate, const heedful_array *grad_up,
                                                  const heedful_threads *threads);

#ifdef __cplusplus
}
#endif
#endif
