#include "heedful_ops/gated.h"
#include "arrays.h"

namespace heedful {
namespace {

/* activation(gate) * up, both of one shape and dtype, activation being a heedful_activation. out is as
 * torch.empty_like(gate). */
constexpr const char *forward_schema = "gated(Tensor gate, Tensor up, int activation) -> Tensor";
/* The same of the halves of x's last dimension, of which the first is the gate, or where gate_first is false the
 * second. out is as torch.empty_like of a half. */
constexpr const char *packed_schema = "gated_packed(Tensor x, int activation, bool gate_first) -> Tensor";
/* Each gradient is as torch.empty_like of its input. */
constexpr const char *backward_schema =
    "gated_backward(Tensor grad_out, Tensor gate, Tensor up, int activation) -> (Tensor grad_gate, Tensor grad_up)";
constexpr const char *packed_backward_schema =
    "gated_packed_backward(Tensor grad_out, Tensor x, int activation, bool gate_first) -> Tensor";

int64_t bytes_of(int32_t dtype) { return dtype == HEEDFUL_FLOAT64 ? 8 : dtype == HEEDFUL_FLOAT32 ? 4 : 2; }

/* The halves of an array's last dimension. They refer to this object. */
class Halves {
  public:
    explicit Halves(const heedful_array &whole)
        : sizes_(whole.size, whole.size + whole.ndim), first(whole), second(whole) {
        if (whole.ndim == 0 || whole.size[whole.ndim - 1] % 2 != 0) fail("x: takes an even size of the last dimension");
        const int64_t half = sizes_.back() /= 2;
        first.size = second.size = sizes_.data();
        if (whole.data != nullptr)
            second.data = static_cast<char *>(whole.data) + half * whole.stride[whole.ndim - 1] * bytes_of(whole.dtype);
    }
    Halves(const Halves &) = delete;
    Halves &operator=(const Halves &) = delete;

  private:
    std::vector<int64_t> sizes_;

  public:
    heedful_array first, second;
};

void forward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor gate(stack[0]), up(stack[1]);
    const heedful_array gate_array = array(gate, "gate"), up_array = array(up, "up");
    Tensor out = empty_like(gate_array);
    const heedful_array out_array = array(out, "out");
    const heedful_threads threads = torch_threads();
    check_status(heedful_gated(&gate_array, &up_array, scalar<int32_t>(stack[2]), &out_array, &threads));
    stack[0] = out.release();
}

void packed(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor x(stack[0]);
    const Halves halves(array(x, "x"));
    const bool gate_first = scalar<bool>(stack[2]);
    const heedful_array &gate = gate_first ? halves.first : halves.second,
                        &up = gate_first ? halves.second : halves.first;
    Tensor out = empty_like(halves.first);
    const heedful_array out_array = array(out, "out");
    const heedful_threads threads = torch_threads();
    check_status(heedful_gated(&gate, &up, scalar<int32_t>(stack[1]), &out_array, &threads));
    stack[0] = out.release();
}

void backward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor grad_out(stack[0]), gate(stack[1]), up(stack[2]);
    const heedful_array grad_out_array = array(grad_out, "grad_out"), gate_array = array(gate, "gate"),
                        up_array = array(up, "up");
    Tensor grad_gate = empty_like(gate_array), grad_up = empty_like(up_array);
    const heedful_array grad_gate_array = array(grad_gate, "grad_gate"), grad_up_array = array(grad_up, "grad_up");
    const heedful_threads threads = torch_threads();
    check_status(heedful_gated_backward(&grad_out_array, &gate_array, &up_array, scalar<int32_t>(stack[3]),
                                        &grad_gate_array, &grad_up_array, &threads));
    stack[0] = grad_gate.release();
    stack[1] = grad_up.release();
}

void packed_backward(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor grad_out(stack[0]), x(stack[1]);
    const heedful_array grad_out_array = array(grad_out, "grad_out"), x_array = array(x, "x");
    const Halves halves(x_array);
    Tensor grad_x = empty_like(x_array);
    const Halves grads(array(grad_x, "grad_x"));
    const bool gate_first = scalar<bool>(stack[3]);
    const heedful_array &gate = gate_first ? halves.first : halves.second,
                        &up = gate_first ? halves.second : halves.first,
                        &grad_gate = gate_first ? grads.first : grads.second,
                        &grad_up = gate_first ? grads.second : grads.first;
    const heedful_threads threads = torch_threads();
    check_status(
        heedful_gated_backward(&grad_out_array, &gate, &up, scalar<int32_t>(stack[2]), &grad_gate, &grad_up, &threads));
    stack[0] = grad_x.release();
}

[[maybe_unused]] const bool registered =
    register_operator(forward_schema, forward) && register_operator(packed_schema, packed) &&
    register_operator(backward_schema, backward) && register_operator(packed_backward_schema, packed_backward);

} // namespace
} // namespace heedful
