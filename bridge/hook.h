/* heedful in the place of PyTorch's CPU kernel of scaled_dot_product_attention, for everything that reaches it: eager
 * calls, autograd, compiled graphs, C++. */
#ifndef HEEDFUL_BRIDGE_HOOK_H
#define HEEDFUL_BRIDGE_HOOK_H

#include "torch_shim.h"

namespace heedful {

/* limits: int64 (6): the pairs below which a call is left to PyTorch in float32, bfloat16, float16 and float64, and the
 * queries and the bytes of keys and values up to which one is, as src/heedful/backend/native/prefer.py has them.
 * INT64_MAX pairs are those of a processor on which the engine never pays. With no element the hook is taken away. The
 * tensor is an argument so that the operator has a device. */
constexpr const char *sdpa_hook_schema = "sdpa_hook(Tensor limits) -> ()";
/* change: int64 (1), 1 or -1: calls of this thread between the two go to PyTorch's kernel. */
constexpr const char *sdpa_bypass_schema = "sdpa_bypass(Tensor change) -> ()";
/* switch: int64 (1): 1 begins to record calls, 0 ends it. int64 (n, 11), what was recorded until now: backward,
 * outcome, torch's code of the dtype, B, H, Hkv, Lq, Lk, D, calls, nanoseconds. An outcome is a Seen, or a Left of
 * hook.cpp. */
constexpr const char *sdpa_calls_schema = "sdpa_calls(Tensor switch) -> Tensor";

void sdpa_hook(StableIValue *stack, uint64_t argument_count, uint64_t result_count);
void sdpa_bypass(StableIValue *stack, uint64_t argument_count, uint64_t result_count);
void sdpa_calls(StableIValue *stack, uint64_t argument_count, uint64_t result_count);

} // namespace heedful

#endif
