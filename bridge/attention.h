/* The attention operators, as libtorch's dispatcher calls them. */
#ifndef HEEDFUL_BRIDGE_ATTENTION_H
#define HEEDFUL_BRIDGE_ATTENTION_H

#include "torch_shim.h"

namespace heedful {

constexpr const char *attention_forward_schema =
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor[] operands, int[] schedule, float scale, "
    "bool blhd) -> (Tensor out, Tensor lse)";

/* query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), any strides; operands and schedule as
 * src/heedful/patterns/schedule.py writes them; out (B, H, Lq, Dv), in (B, Lq, H, Dv) memory order where blhd;
 * lse (B, H, Lq). */
void attention_forward(StableIValue *stack, uint64_t argument_count, uint64_t result_count);

} // namespace heedful

#endif
