#include "heedful_ops/layer_norm_gelu.h"
#include "arrays.h"

namespace heedful {
namespace {

/* x of any shape and strides but none without dimensions; weight and bias of one element for each index of its last
 * dimension. out is as torch.empty_like(x). */
constexpr const char *forward_schema =
    "layer_norm_gelu(Tensor x, Tensor? weight, Tensor? bias, float eps, bool tanh) -> Tensor";
/* grad_x is as torch.empty_like(x). grad_weight and grad_bias, of the type that is computed in, have shape (0) where
 * they are not asked for. */
constexpr const char *backward_schema =
    "layer_norm_gelu_backward(Tensor grad_out, Tensor x, Tensor? weight, Tensor? bias, float eps, bool tanh, "
    "bool columns_gradients) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)";

void forward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor x(stack[0]), weight = Tensor::optional(stack[1]), bias = Tensor::optional(stack[2]);
    const heedful_array x_array = array(x, "x"), weight_array = optional_array(weight, "weight"),
                        bias_array = optional_array(bias, "bias");
    Tensor out = empty_like(x_array);
    const heedful_array out_array = array(out, "out");
    const heedful_threads threads = torch_threads();
    check_status(heedful_layer_norm_gelu(&x_array, &weight_array, &bias_array, scalar<double>(stack[3]),
                                         scalar<bool>(stack[4]), &out_array, &threads));
    stack[0] = out.release();
}

void backward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor grad_out(stack[0]), x(stack[1]), weight = Tensor::optional(stack[2]),
                                                  bias = Tensor::optional(stack[3]);
    const heedful_array grad_out_array = array(grad_out, "grad_out"), x_array = array(x, "x"),
                        weight_array = optional_array(weight, "weight"), bias_array = optional_array(bias, "bias");
    const bool wanted = scalar<bool>(stack[6]);
    const int64_t columns = wanted ? (x_array.ndim > 0 ? x_array.size[x_array.ndim - 1] : 1) : 0;
    const heedful_dtype computed = computed_dtype(x_array.dtype);
    Tensor grad_x = empty_like(x_array), grad_weight = empty({columns}, computed),
           grad_bias = empty({columns}, computed);
    const heedful_array grad_x_array = array(grad_x, "grad_x"), grad_weight_array = array(grad_weight, "grad_weight"),
                        grad_bias_array = array(grad_bias, "grad_bias");
    const heedful_threads threads = torch_threads();
    check_status(heedful_layer_norm_gelu_backward(
        &grad_out_array, &x_array, &weight_array, &bias_array, scalar<double>(stack[4]), scalar<bool>(stack[5]),
        &grad_x_array, wanted ? &grad_weight_array : nullptr, wanted ? &grad_bias_array : nullptr, &threads));
    stack[0] = grad_x.release();
    stack[1] = grad_weight.release();
    stack[2] = grad_bias.release();
}

[[maybe_unused]] const bool registered =
    register_operator(forward_schema, forward) && register_operator(backward_schema, backward);

} // namespace
} // namespace heedful
