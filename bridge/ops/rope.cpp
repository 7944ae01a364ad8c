#include "heedful_ops/rope.h"
#include "arrays.h"

namespace heedful {
namespace {

/* x (..., D). cos and sin broadcast to (..., R) with x's leading sizes; or they are (P, R), and positions, which
 * broadcasts to x's leading sizes, has each row's place in them. out is as torch.empty_like(x). With the angles negated
 * where inverse, which is also the gradient's way. */
constexpr const char *schema =
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor";
constexpr const char *in_place_schema =
    "rope_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> ()";

struct Arguments {
    Tensor x, cos, sin, positions;
    explicit Arguments(StableIValue *stack)
        : x(stack[0]), cos(stack[1]), sin(stack[2]), positions(Tensor::optional(stack[3])) {}
};

void turn(const Arguments &given, const heedful_array &x, const heedful_array &out, const StableIValue *stack) {
    const heedful_array cos = array(given.cos, "cos"), sin = array(given.sin, "sin"),
                        positions = optional_array(given.positions, "positions");
    const heedful_threads threads = torch_threads();
    check_status(
        heedful_rope(&x, &cos, &sin, &positions, scalar<bool>(stack[4]), scalar<bool>(stack[5]), &out, &threads));
}

void forward(StableIValue *stack, uint64_t, uint64_t) {
    const Arguments given(stack);
    const heedful_array x = array(given.x, "x");
    Tensor out = empty_like(x);
    turn(given, x, array(out, "out"), stack);
    stack[0] = out.release();
}

void in_place(StableIValue *stack, uint64_t, uint64_t) {
    const Arguments given(stack);
    const heedful_array x = array(given.x, "x");
    turn(given, x, x, stack);
}

[[maybe_unused]] const bool registered =
    register_operator(schema, forward) && register_operator(in_place_schema, in_place);

} // namespace
} // namespace heedful
