#include "heedful_ops/parametric_swish.h"
#include "arrays.h"

namespace heedful {
namespace {

/* x of any shape and strides; betas, where given in beta's place, of one element or one for each index of x's dimension
 * dim, which counts from the front. out is as torch.empty_like(x). */
constexpr const char *forward_schema = "parametric_swish(Tensor x, Tensor? betas, float beta, int dim) -> Tensor";
constexpr const char *in_place_schema = "parametric_swish_(Tensor(a!) x, Tensor? betas, float beta, int dim) -> ()";
/* grad_x is as torch.empty_like(x). grad_betas, of as many elements as betas and of the type that is computed in, has
 * shape (0) where it is not asked for. */
constexpr const char *backward_schema =
    "parametric_swish_backward(Tensor grad_out, Tensor x, Tensor? betas, float beta, int dim, bool betas_gradient) -> "
    "(Tensor grad_x, Tensor grad_betas)";

void forward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor x(stack[0]), betas = Tensor::optional(stack[1]);
    const heedful_array x_array = array(x, "x"), betas_array = optional_array(betas, "betas");
    Tensor out = empty_like(x_array);
    const heedful_array out_array = array(out, "out");
    const heedful_threads threads = torch_threads();
    check_status(heedful_parametric_swish(&x_array, &betas_array, scalar<double>(stack[2]), scalar<int32_t>(stack[3]),
                                          &out_array, &threads));
    stack[0] = out.release();
}

void in_place(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor x(stack[0]), betas = Tensor::optional(stack[1]);
    const heedful_array x_array = array(x, "x"), betas_array = optional_array(betas, "betas");
    const heedful_threads threads = torch_threads();
    check_status(heedful_parametric_swish(&x_array, &betas_array, scalar<double>(stack[2]), scalar<int32_t>(stack[3]),
                                          &x_array, &threads));
}

void backward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor grad_out(stack[0]), x(stack[1]), betas = Tensor::optional(stack[2]);
    const heedful_array grad_out_array = array(grad_out, "grad_out"), x_array = array(x, "x"),
                        betas_array = optional_array(betas, "betas");
    const bool wanted = scalar<bool>(stack[5]);
    const int64_t count = betas.get() == nullptr || betas_array.ndim == 0 ? 1 : betas_array.size[0];
    Tensor grad_x = empty_like(x_array), grad_betas = empty({wanted ? count : 0}, computed_dtype(x_array.dtype));
    const heedful_array grad_x_array = array(grad_x, "grad_x"), grad_betas_array = array(grad_betas, "grad_betas");
    const heedful_threads threads = torch_threads();
    check_status(heedful_parametric_swish_backward(&grad_out_array, &x_array, &betas_array, scalar<double>(stack[3]),
                                                   scalar<int32_t>(stack[4]), &grad_x_array,
                                                   wanted ? &grad_betas_array : nullptr, &threads));
    stack[0] = grad_x.release();
    stack[1] = grad_betas.release();
}

[[maybe_unused]] const bool registered = register_operator(forward_schema, forward) &&
                                         register_operator(in_place_schema, in_place) &&
                                         register_operator(backward_schema, backward);

} // namespace
} // namespace heedful
