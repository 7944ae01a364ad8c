#include "heedful_ops/cross_entropy.h"
#include "arrays.h"

namespace heedful {
namespace {

/* logits (n, classes), target (n), int64; softcap 0 for none. losses and lse: (n), in the type that is computed in. */
constexpr const char *forward_schema = "cross_entropy(Tensor logits, Tensor target, int ignore_index, float smoothing, "
                                       "float softcap) -> (Tensor losses, Tensor lse)";
/* As torch.empty_like(logits). */
constexpr const char *backward_schema =
    "cross_entropy_backward(Tensor grad_losses, Tensor? grad_lse, Tensor logits, Tensor target, Tensor lse, "
    "int ignore_index, float smoothing, float softcap) -> Tensor";
/* The same for the classes from `first` on, as many as logits has columns. statistics (n, 4), float64, passes from one
 * call to the next; losses and lse are written by the call that sees the last class. */
constexpr const char *part_schema =
    "cross_entropy_part_(Tensor logits, Tensor target, int ignore_index, float smoothing, float softcap, int first, "
    "int classes, Tensor(a!) statistics, Tensor(b!) losses, Tensor(c!) lse) -> ()";
/* The gradient of these logits in their place. */
constexpr const char *part_backward_schema =
    "cross_entropy_part_backward_(Tensor grad_losses, Tensor? grad_lse, Tensor(a!) logits, Tensor target, Tensor lse, "
    "int ignore_index, float smoothing, float softcap, int first, int classes) -> ()";

/* ignore_index, smoothing and softcap lie on the stack in this order. */
heedful_cross_entropy_terms terms_at(const StableIValue *stack, int64_t first, int64_t classes) {
    return {first, classes, scalar<int64_t>(stack[0]), scalar<double>(stack[1]), scalar<double>(stack[2])};
}
int64_t columns(const heedful_array &logits) {
    if (logits.ndim != 2) fail("logits: takes 2 dimensions");
    return logits.size[1];
}

void forward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor logits(stack[0]), target(stack[1]);
    const heedful_array logits_array = array(logits, "logits"), target_array = array(target, "target");
    const heedful_cross_entropy_terms terms = terms_at(stack + 2, 0, columns(logits_array));
    Tensor losses = empty({logits_array.size[0]}, computed_dtype(logits_array.dtype)),
           lse = empty({logits_array.size[0]}, computed_dtype(logits_array.dtype));
    const heedful_array losses_array = array(losses, "losses"), lse_array = array(lse, "lse");
    const heedful_threads threads = torch_threads();
    check_status(
        heedful_cross_entropy(&logits_array, &target_array, &terms, nullptr, &losses_array, &lse_array, &threads));
    stack[0] = losses.release();
    stack[1] = lse.release();
}

void part(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor logits(stack[0]), target(stack[1]), statistics(stack[7]), losses(stack[8]), lse(stack[9]);
    const heedful_array logits_array = array(logits, "logits"), target_array = array(target, "target"),
                        statistics_array = array(statistics, "statistics"), losses_array = array(losses, "losses"),
                        lse_array = array(lse, "lse");
    const heedful_cross_entropy_terms terms = terms_at(stack + 2, scalar<int64_t>(stack[5]), scalar<int64_t>(stack[6]));
    const heedful_threads threads = torch_threads();
    check_status(heedful_cross_entropy(&logits_array, &target_array, &terms, &statistics_array, &losses_array,
                                       &lse_array, &threads));
}

struct Gradients {
    Tensor losses, of_lse, logits, target, lse;
    explicit Gradients(StableIValue *stack)
        : losses(stack[0]), of_lse(Tensor::optional(stack[1])), logits(stack[2]), target(stack[3]), lse(stack[4]) {}

    void run(const heedful_array &logits_array, const heedful_cross_entropy_terms &terms,
             const heedful_array &grad_logits) const {
        const heedful_array losses_array = array(losses, "grad_losses"),
                            of_lse_array = optional_array(of_lse, "grad_lse"), target_array = array(target, "target"),
                            lse_array = array(lse, "lse");
        const heedful_threads threads = torch_threads();
        check_status(heedful_cross_entropy_backward(&losses_array, &of_lse_array, &logits_array, &target_array, &terms,
                                                    &lse_array, &grad_logits, &threads));
    }
};

void backward(StableIValue *stack, uint64_t, uint64_t) {
    const Gradients given(stack);
    const heedful_array logits = array(given.logits, "logits");
    Tensor grad_logits = empty_like(logits);
    given.run(logits, terms_at(stack + 5, 0, columns(logits)), array(grad_logits, "grad_logits"));
    stack[0] = grad_logits.release();
}

void part_backward(StableIValue *stack, uint64_t, uint64_t) {
    const Gradients given(stack);
    const heedful_array logits = array(given.logits, "logits");
    given.run(logits, terms_at(stack + 5, scalar<int64_t>(stack[8]), scalar<int64_t>(stack[9])), logits);
}

[[maybe_unused]] const bool registered =
    register_operator(forward_schema, forward) && register_operator(backward_schema, backward) &&
    register_operator(part_schema, part) && register_operator(part_backward_schema, part_backward);

} // namespace
} // namespace heedful
