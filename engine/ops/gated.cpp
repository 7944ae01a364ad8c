// out = activation(gate) * up, and its gradients: the slope of the activation times up for gate, the activation for up.
#include "tiers.h"

#include "heedful_ops/gated.h"
#if defined(HEEDFUL_TIER)
#include "activations.h"
#endif

namespace heedful {

struct GatedKernels {
    // By heedful_activation and heedful_dtype.
    void (*forward[3][4])(const void *gate, const void *up, void *out, int64_t n);
    void (*backward[3][4])(const void *grad_out, const void *gate, const void *up, void *grad_gate, void *grad_up,
                           int64_t n);
};
HEEDFUL_KERNELS(GatedKernels, gated)

#if defined(HEEDFUL_TIER)

namespace {

template <class Activation, class In> struct Gated {
    typedef typename ComputedIn<In>::type T;
    typedef typename Real<T>::V V;

    static void forward(const void *gate_data, const void *up_data, void *out_data, int64_t n) {
        const In *const gate = static_cast<const In *>(gate_data), *const up = static_cast<const In *>(up_data);
        In *const out = static_cast<In *>(out_data);
        for_vectors<T>(n, [=](int64_t i, auto part) {
            part.store(out + i, Activation::template value<T, In>(part.load(gate + i)) * part.load(up + i));
        });
    }
    static void backward(const void *grad_out_data, const void *gate_data, const void *up_data, void *grad_gate_data,
                         void *grad_up_data, int64_t n) {
        const In *const grad_out = static_cast<const In *>(grad_out_data),
                        *const gate = static_cast<const In *>(gate_data), *const up = static_cast<const In *>(up_data);
        In *const grad_gate = static_cast<In *>(grad_gate_data), *const grad_up = static_cast<In *>(grad_up_data);
        for_vectors<T>(n, [=](int64_t i, auto part) {
            const V g = part.load(grad_out + i), u = part.load(up + i);
            const WithSlope<T> a = Activation::template with_slope<T, In>(part.load(gate + i));
            part.store(grad_gate + i, g * u * a.slope);
            part.store(grad_up + i, g * a.value);
        });
    }
};

} // namespace

#define FOR_TYPES(Activation, function)                                                                                \
    {Gated<Activation, float>::function, Gated<Activation, bfloat16>::function, Gated<Activation, float16>::function,  \
     Gated<Activation, double>::function}
const GatedKernels HEEDFUL_TIER::gated = {
    {FOR_TYPES(Silu, forward), FOR_TYPES(Gelu, forward), FOR_TYPES(GeluTanh, forward)},
    {FOR_TYPES(Silu, backward), FOR_TYPES(Gelu, backward), FOR_TYPES(GeluTanh, backward)},
};
#undef FOR_TYPES

#else

namespace {

void check_gated(const heedful_array &gate, const heedful_array &up, int32_t activation) {
    check_array("gate", gate);
    check_like("up", up, "gate", gate);
    REQUIRE(activation >= HEEDFUL_SILU && activation <= HEEDFUL_GELU_TANH,
            "activation: is " + std::to_string(activation) + ", takes a heedful_activation");
}

void forward_gated(const heedful_array &gate, const heedful_array &up, int32_t activation, const heedful_array &out,
                   const heedful_threads *threads) {
    check_gated(gate, up, activation);
    check_like("out", out, "gate", gate);
    const auto kernel = in_use_gated().forward[activation][gate.dtype];
    const Loop loop(gate.ndim, gate.size, {Operand(out, WRITTEN), Operand(gate, READ), Operand(up, READ)});
    loop.run(threads, [=](const Run<3> &run) { kernel(run.data[1], run.data[2], run.data[0], run.n); });
}

void backward_gated(const heedful_array &grad_out, const heedful_array &gate, const heedful_array &up,
                    int32_t activation, const heedful_array &grad_gate, const heedful_array &grad_up,
                    const heedful_threads *threads) {
    check_gated(gate, up, activation);
    check_like("grad_out", grad_out, "gate", gate);
    check_like("grad_gate", grad_gate, "gate", gate);
    check_like("grad_up", grad_up, "gate", gate);
    const auto kernel = in_use_gated().backward[activation][gate.dtype];
    const Loop loop(gate.ndim, gate.size,
                    {Operand(grad_gate, WRITTEN), Operand(grad_up, WRITTEN), Operand(grad_out, READ),
                     Operand(gate, READ), Operand(up, READ)});
    loop.run(threads, [=](const Run<5> &run) {
        kernel(run.data[2], run.data[3], run.data[4], run.data[0], run.data[1], run.n);
    });
}

} // namespace

#endif

} // namespace heedful

#if !defined(HEEDFUL_TIER)

extern "C" heedful_status heedful_gated(const heedful_array *gate, const heedful_array *up, int32_t activation,
                                        const heedful_array *out, const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::forward_gated(*gate, *up, activation, *out, threads); });
}

extern "C" heedful_status heedful_gated_backward(const heedful_array *grad_out, const heedful_array *gate,
                                                 const heedful_array *up, int32_t activation,
                                                 const heedful_array *grad_gate, const heedful_array *grad_up,
                                                 const heedful_threads *threads) {
    return heedful::guarded(
        [&] { heedful::backward_gated(*grad_out, *gate, *up, activation, *grad_gate, *grad_up, threads); });
}

#endif
