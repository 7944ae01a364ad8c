#include "arguments.h"
#include "attention.h"
#include "threads.h"

namespace heedful {
namespace {

/* Uninitialised, in the memory order of what it is the gradient of. */
Tensor empty_gradient(const heedful_tensor &of, heedful_tensor &view) {
    return empty_4d(of.size[0], of.size[1], of.size[2], of.size[3], of.stride[1] < of.stride[2],
                    static_cast<heedful_dtype>(of.dtype), view);
}

} // namespace

void attention_backward(StableIValue *stack, uint64_t, uint64_t) {
    /* Every handle is owned before anything can fail. */
    const Tensor grad_out(stack[0]), query(stack[1]), key(stack[2]), value(stack[3]), out(stack[4]), lse(stack[5]);
    const Tensor bias = Tensor::optional(stack[9]), alibi_slopes = Tensor::optional(stack[10]),
                 seed = Tensor::optional(stack[13]), grad_lse = Tensor::optional(stack[14]),
                 grad_weights = Tensor::optional(stack[15]), query_offset = Tensor::optional(stack[18]);
    Schedule schedule(stack[6], stack[7]);
    const bool bias_gradient = scalar<bool>(stack[16]), slopes_gradient = scalar<bool>(stack[17]);

    heedful_backward arguments;
    arguments.query = view_of_rank_4(query, "query");
    arguments.key = view_of_rank_4(key, "key");
    arguments.value = view_of_rank_4(value, "value");
    arguments.out = view(out, "out");
    arguments.lse = view(lse, "lse");
    arguments.grad_out = view(grad_out, "grad_out");
    arguments.grad_lse = optional_view(grad_lse, "grad_lse");
    arguments.grad_weights = optional_view(grad_weights, "grad_weights");
    arguments.scale = scalar<double>(stack[8]);
    arguments.schedule = schedule.view();
    arguments.features = {};
    arguments.features.bias = optional_view(bias, "bias");
    arguments.features.alibi_slopes = optional_view(alibi_slopes, "alibi_slopes");
    arguments.features.query_offset = optional_view(query_offset, "query_offset");
    arguments.features.softcap = scalar<double>(stack[11]);
    set_dropout(arguments.features, scalar<double>(stack[12]), seed);

    const heedful_tensor &q = arguments.query, &b = arguments.features.bias;
    const heedful_dtype statistics = statistics_dtype(q);
    if (bias_gradient && (bias.get() == nullptr || b.ndim != 4)) fail("bias_gradient takes a bias of 4 dimensions");
    if (slopes_gradient && alibi_slopes.get() == nullptr) fail("slopes_gradient takes alibi_slopes");
    Tensor grad_query = empty_gradient(q, arguments.grad_query);
    Tensor grad_key = empty_gradient(arguments.key, arguments.grad_key);
    Tensor grad_value = empty_gradient(arguments.value, arguments.grad_value);
    Tensor delta = empty_per_row(q, statistics, arguments.delta);
    Tensor grad_bias = bias_gradient ? empty_4d(b.size[0], b.size[1], b.size[2], arguments.key.size[2], false,
                                                statistics, arguments.grad_bias)
                                     : Tensor::empty({0}, {1}, statistics, arguments.grad_bias);
    Tensor grad_slopes = slopes_gradient ? empty_per_row(q, statistics, arguments.grad_slopes)
                                         : Tensor::empty({0}, {1}, statistics, arguments.grad_slopes);
    if (!bias_gradient) arguments.grad_bias.data = nullptr;
    if (!slopes_gradient) arguments.grad_slopes.data = nullptr;

    const heedful_threads threads = torch_threads();
    check_status(heedful_attention_backward(&arguments, &threads));
    stack[0] = grad_query.release();
    stack[1] = grad_key.release();
    stack[2] = grad_value.release();
    stack[3] = delta.release();
    stack[4] = grad_bias.release();
    stack[5] = grad_slopes.release();
}

} // namespace heedful
