#include "heedful_ops/softmax.h"
#include "arrays.h"

namespace heedful {
namespace {

/* x of any shape and strides; mask of a shape that broadcasts to it, bool, of its dtype or of the type that is computed
 * in; softcap 0 for none. out is as torch.empty_like(x). */
constexpr const char *forward_schema = "softmax(Tensor x, Tensor? mask, float scale, float softcap) -> Tensor";
/* x is not needed where softcap is 0. grad_x is as torch.empty_like(out), and so is grad_scores, of the type that is
 * computed in, or has shape (0) where it is not asked for. */
constexpr const char *backward_schema =
    "softmax_backward(Tensor grad_out, Tensor out, Tensor? x, float scale, float softcap, bool scores_gradient) -> "
    "(Tensor grad_x, Tensor grad_scores)";

void forward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor x(stack[0]), mask = Tensor::optional(stack[1]);
    const heedful_array x_array = array(x, "x"), mask_array = optional_array(mask, "mask");
    Tensor out = empty_like(x_array);
    const heedful_array out_array = array(out, "out");
    const heedful_threads threads = torch_threads();
    check_status(heedful_softmax(&x_array, &mask_array, scalar<double>(stack[2]), scalar<double>(stack[3]), &out_array,
                                 &threads));
    stack[0] = out.release();
}

void backward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor grad_out(stack[0]), out(stack[1]), x = Tensor::optional(stack[2]);
    const heedful_array grad_out_array = array(grad_out, "grad_out"), out_array = array(out, "out"),
                        x_array = optional_array(x, "x");
    const bool wanted = scalar<bool>(stack[5]);
    heedful_array wide = out_array;
    wide.dtype = computed_dtype(out_array.dtype);
    Tensor grad_x = empty_like(out_array),
           grad_scores = wanted ? empty_like(wide) : empty({0}, static_cast<heedful_dtype>(wide.dtype));
    const heedful_array grad_x_array = array(grad_x, "grad_x"), grad_scores_array = array(grad_scores, "grad_scores");
    const heedful_threads threads = torch_threads();
    check_status(heedful_softmax_backward(&grad_out_array, &out_array, &x_array, scalar<double>(stack[3]),
                                          scalar<double>(stack[4]), &grad_x_array,
                                          wanted ? &grad_scores_array : nullptr, &threads));
    stack[0] = grad_x.release();
    stack[1] = grad_scores.release();
}

[[maybe_unused]] const bool registered =
    register_operator(forward_schema, forward) && register_operator(backward_schema, backward);

} // namespace
} // namespace heedful
