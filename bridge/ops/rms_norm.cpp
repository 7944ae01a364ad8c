#include "heedful_ops/rms_norm.h"
#include "arrays.h"

namespace heedful {
namespace {

/* x of any shape and strides but none without dimensions; weight of one element for each index of its last dimension.
 * out is as torch.empty_like(x). */
constexpr const char *forward_schema = "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor";
/* Both as torch.empty_like(x). */
constexpr const char *add_schema =
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor out, Tensor sum)";
/* added: what else arrives at x. grad_x is as torch.empty_like(x). grad_weight, of the type that is computed in, has
 * shape (0) where it is not asked for. */
constexpr const char *backward_schema =
    "rms_norm_backward(Tensor grad_out, Tensor? added, Tensor x, Tensor? weight, float eps, bool weight_gradient) -> "
    "(Tensor grad_x, Tensor grad_weight)";

void forward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor x(stack[0]), weight = Tensor::optional(stack[1]);
    const heedful_array x_array = array(x, "x"), weight_array = optional_array(weight, "weight");
    Tensor out = empty_like(x_array);
    const heedful_array out_array = array(out, "out");
    const heedful_threads threads = torch_threads();
    check_status(heedful_rms_norm(&x_array, &weight_array, scalar<double>(stack[2]), &out_array, &threads));
    stack[0] = out.release();
}

void add_forward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor x(stack[0]), residual(stack[1]), weight = Tensor::optional(stack[2]);
    const heedful_array x_array = array(x, "x"), residual_array = array(residual, "residual"),
                        weight_array = optional_array(weight, "weight");
    Tensor out = empty_like(x_array), sum = empty_like(x_array);
    const heedful_array out_array = array(out, "out"), sum_array = array(sum, "sum");
    const heedful_threads threads = torch_threads();
    check_status(heedful_add_rms_norm(&x_array, &residual_array, &weight_array, scalar<double>(stack[3]), &out_array,
                                      &sum_array, &threads));
    stack[0] = out.release();
    stack[1] = sum.release();
}

void backward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor grad_out(stack[0]), added = Tensor::optional(stack[1]), x(stack[2]),
                                     weight = Tensor::optional(stack[3]);
    const heedful_array grad_out_array = array(grad_out, "grad_out"), added_array = optional_array(added, "added"),
                        x_array = array(x, "x"), weight_array = optional_array(weight, "weight");
    const bool wanted = scalar<bool>(stack[5]);
    const int64_t columns = x_array.ndim > 0 ? x_array.size[x_array.ndim - 1] : 1;
    Tensor grad_x = empty_like(x_array), grad_weight = empty({wanted ? columns : 0}, computed_dtype(x_array.dtype));
    const heedful_array grad_x_array = array(grad_x, "grad_x"), grad_weight_array = array(grad_weight, "grad_weight");
    const heedful_threads threads = torch_threads();
    check_status(heedful_rms_norm_backward(&grad_out_array, &added_array, &x_array, &weight_array,
                                           scalar<double>(stack[4]), &grad_x_array,
                                           wanted ? &grad_weight_array : nullptr, &threads));
    stack[0] = grad_x.release();
    stack[1] = grad_weight.release();
}

[[maybe_unused]] const bool registered = register_operator(forward_schema, forward) &&
                                         register_operator(add_schema, add_forward) &&
                                         register_operator(backward_schema, backward);

} // namespace
} // namespace heedful
