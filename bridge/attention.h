/* The attention operators, as libtorch's dispatcher calls them.
 *
 * query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), any strides; operands and schedule as
 * src/heedful/patterns/schedule.py writes them; bias 4-D, broadcasting to (B, H, Lq, Lk); alibi_slopes (B or 1, H)
 * or (B or 1, H, Lq); sinks (H); seed int64 (1); pages int32 (B, n); query_offset int32 (B or 1) or (B or 1, Lq): what
 * each means is in heedful.h. */
#ifndef HEEDFUL_BRIDGE_ATTENTION_H
#define HEEDFUL_BRIDGE_ATTENTION_H

#include "torch_shim.h"

namespace heedful {

/* out (B, H, Lq, Dv), in (B, Lq, H, Dv) memory order where blhd; lse (B, H, Lq). */
constexpr const char *attention_forward_schema =
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor[] operands, int[] schedule, float scale, "
    "bool blhd, Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? sinks=None, float softcap=0.0, "
    "float dropout_p=0.0, Tensor? seed=None, Tensor? pages=None, Tensor? query_offset=None) -> (Tensor out, Tensor "
    "lse)";

/* The gradients of query, key and value are dense, in (B, L, H, D) memory order where that is the tensor's own. delta
 * is as lse. grad_bias (bias's B, H and Lq sizes, Lk) and grad_slopes (B, H, Lq), in lse's dtype, have shape (0) where
 * they are not asked for. */
constexpr const char *attention_backward_schema =
    "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor[] operands, int[] schedule, float scale, Tensor? bias, Tensor? alibi_slopes, float softcap, "
    "float dropout_p, Tensor? seed, Tensor? grad_lse, Tensor? grad_weights, bool bias_gradient, "
    "bool slopes_gradient, Tensor? query_offset=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
    "Tensor delta, Tensor grad_bias, Tensor grad_slopes)";

/* (B, H, Lq, Lk), contiguous, in query's dtype. */
constexpr const char *attention_weights_schema =
    "attention_weights(Tensor query, Tensor key, Tensor lse, Tensor[] operands, int[] schedule, float scale, "
    "Tensor? bias, Tensor? alibi_slopes, float softcap, float dropout_p, Tensor? seed, "
    "Tensor? query_offset=None) -> Tensor";

/* The same for the pairs that count alone: indices (4, n) int64, the b, h, i, j of each in ascending order, and
 * values (n). */
constexpr const char *attention_weights_sparse_schema =
    "attention_weights_sparse(Tensor query, Tensor key, Tensor lse, Tensor[] operands, int[] schedule, float scale, "
    "Tensor? bias, Tensor? alibi_slopes, float softcap, float dropout_p, Tensor? seed, "
    "Tensor? query_offset=None) -> (Tensor indices, Tensor values)";

void attention_forward(StableIValue *stack, uint64_t argument_count, uint64_t result_count);
void attention_backward(StableIValue *stack, uint64_t argument_count, uint64_t result_count);
void attention_weights(StableIValue *stack, uint64_t argument_count, uint64_t result_count);
void attention_weights_sparse(StableIValue *stack, uint64_t argument_count, uint64_t result_count);

} // namespace heedful

#endif
