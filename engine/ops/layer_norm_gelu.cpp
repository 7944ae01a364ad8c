// out = gelu(z) with z = y w + b and y = (x - mean) r, r = (variance + eps)^(-1/2). With d = g gelu'(z), the gradients
// are r (d w - mean(d w) - y mean(d w y)) for x, and the sums over rows of d y for w and of d for b.
#include "tiers.h"

#include "heedful_ops/layer_norm_gelu.h"
#include "rows.h"
#if defined(HEEDFUL_TIER)
#include "activations.h"
#endif

namespace heedful {

struct LayerNormGeluKernels {
    // By whether the approximation is meant and heedful_dtype. weight and bias are in the type that is computed in.
    void (*forward[2][4])(const RowBlock<2> &rows, const void *weight, const void *bias, double eps); // out, x
    // grad_x, x, grad_out. Adds the gradients of weight and, a row's length behind them, of bias to sums where they are
    // not null. scratch: a row in the type that is computed in.
    void (*backward[2][4])(const RowBlock<3> &rows, const void *weight, const void *bias, double eps, void *sums,
                           void *scratch);
    void (*widen[4])(const void *from, void *to, int64_t n);
};
HEEDFUL_KERNELS(LayerNormGeluKernels, layer_norm_gelu)

#if defined(HEEDFUL_TIER)

namespace {

template <class T> struct Moments {
    T mean, rate; // 1 / sqrt(variance + eps)
};
// In two passes: with one, a mean far from 0 would leave no digits of the variance.
template <class T, class In> INLINE Moments<T> moments(const In *x, T eps, int64_t n) {
    typedef typename Real<T>::V V;
    const T mean = sum_of<T>(n, [=](int64_t i, auto part) { return part.load(x + i); }) / T(n);
    const V center = Real<T>::set1(mean);
    const T squares = sum_of<T>(n, [=](int64_t i, auto part) {
        const V v = or_zero(part, part.load(x + i) - center);
        return v * v;
    });
    return {mean, T(1) / square_root(squares / T(n) + eps)};
}

template <class Activation, class In> struct LayerNorm {
    typedef typename ComputedIn<In>::type T;
    typedef typename Real<T>::V V;

    static void forward(const RowBlock<2> &rows, const void *weight_data, const void *bias_data, double eps) {
        const T *const weight = static_cast<const T *>(weight_data), *const bias = static_cast<const T *>(bias_data);
        for (int64_t row = 0; row < rows.rows; ++row) {
            const In *const x = row_of<In>(rows, 1, row);
            In *const out = row_of<In>(rows, 0, row);
            const Moments<T> m = moments<T>(x, T(eps), rows.columns);
            const V mean = Real<T>::set1(m.mean), rate = Real<T>::set1(m.rate);
            for_vectors<T>(rows.columns, [=](int64_t i, auto part) {
                const V y = (part.load(x + i) - mean) * rate;
                part.store(out + i, Activation::template value<T, In>(y * part.load(weight + i) + part.load(bias + i)));
            });
        }
    }

    template <bool SUMS>
    static void gradients(const RowBlock<3> &rows, const T *weight, const T *bias, T eps, T *grad_weight, T *grad_bias,
                          T *arriving) {
        const int64_t n = rows.columns;
        for (int64_t row = 0; row < rows.rows; ++row) {
            const In *const x = row_of<In>(rows, 1, row), *const grad_out = row_of<In>(rows, 2, row);
            In *const grad_x = row_of<In>(rows, 0, row);
            const Moments<T> m = moments<T>(x, eps, n);
            const V mean = Real<T>::set1(m.mean), rate = Real<T>::set1(m.rate);
            T sums[2]; // of d w and of d w y
            sums_of<T>(n, sums, [=](int64_t i, auto part, V(&terms)[2]) {
                const V y = (part.load(x + i) - mean) * rate, w = part.load(weight + i);
                const V slope = Activation::template with_slope<T>(y * w + part.load(bias + i)).slope;
                const V d = or_zero(part, part.load(grad_out + i) * slope);
                if constexpr (SUMS) {
                    part.store(grad_weight + i, part.load(grad_weight + i) + d * y);
                    part.store(grad_bias + i, part.load(grad_bias + i) + d);
                }
                terms[0] = d * w;
                terms[1] = terms[0] * y;
                part.store(arriving + i, terms[0]);
            });
            const V even = Real<T>::set1(sums[0] / T(n)), along = Real<T>::set1(sums[1] / T(n));
            for_vectors<T>(n, [=](int64_t i, auto part) {
                const V y = (part.load(x + i) - mean) * rate;
                part.store(grad_x + i, rate * (part.load(arriving + i) - even - y * along));
            });
        }
    }
    static void backward(const RowBlock<3> &rows, const void *weight, const void *bias, double eps, void *sums,
                         void *scratch) {
        T *const grad_weight = static_cast<T *>(sums);
        const auto run = sums ? gradients<true> : gradients<false>;
        run(rows, static_cast<const T *>(weight), static_cast<const T *>(bias), T(eps), grad_weight,
            sums ? grad_weight + rows.columns : nullptr, static_cast<T *>(scratch));
    }
};

} // namespace

#define FOR_TYPES(Activation, function)                                                                                \
    {LayerNorm<Activation, float>::function, LayerNorm<Activation, bfloat16>::function,                                \
     LayerNorm<Activation, float16>::function, LayerNorm<Activation, double>::function}
const LayerNormGeluKernels HEEDFUL_TIER::layer_norm_gelu = {
    {FOR_TYPES(Gelu, forward), FOR_TYPES(GeluTanh, forward)},
    {FOR_TYPES(Gelu, backward), FOR_TYPES(GeluTanh, backward)},
    {widen_all<float>, widen_all<bfloat16>, widen_all<float16>, widen_all<double>},
};
#undef FOR_TYPES

#else

namespace {

void check_rows(const heedful_array &x) {
    check_array("x", x);
    REQUIRE(x.ndim > 0, "x: has no dimension, takes 1 or more");
}

void forward(const heedful_array &x, const heedful_array *weight_given, const heedful_array *bias_given, double eps,
             bool tanh, const heedful_array &out, const heedful_threads *threads) {
    check_rows(x);
    check_like("out", out, "x", x);
    const LayerNormGeluKernels &kernels = in_use_layer_norm_gelu();
    const Columns weight("weight", weight_given, 1.0, x, kernels.widen),
        bias("bias", bias_given, 0.0, x, kernels.widen);
    const auto kernel = kernels.forward[tanh][x.dtype];
    const Rows loop(x.ndim, x.size, {Operand(out, WRITTEN), Operand(x, READ)});
    loop.run(threads, 0,
             [&](const RowBlock<2> &rows, int64_t, char *) { kernel(rows, weight.data(), bias.data(), eps); });
}

void backward(const heedful_array &grad_out, const heedful_array &x, const heedful_array *weight_given,
              const heedful_array *bias_given, double eps, bool tanh, const heedful_array &grad_x,
              const heedful_array *grad_weight, const heedful_array *grad_bias, const heedful_threads *threads) {
    check_rows(x);
    check_like("grad_out", grad_out, "x", x);
    check_like("grad_x", grad_x, "x", x);
    const int64_t columns = x.size[x.ndim - 1];
    const int32_t computed = computed_dtype(x.dtype);
    const bool wanted = grad_weight && grad_weight->data && grad_bias && grad_bias->data;
    if (wanted) {
        check_result("grad_weight", *grad_weight, columns, computed);
        check_result("grad_bias", *grad_bias, columns, computed);
    }
    const LayerNormGeluKernels &kernels = in_use_layer_norm_gelu();
    const Columns weight("weight", weight_given, 1.0, x, kernels.widen),
        bias("bias", bias_given, 0.0, x, kernels.widen);
    const auto kernel = kernels.backward[tanh][x.dtype];
    const Rows loop(x.ndim, x.size, {Operand(grad_x, WRITTEN), Operand(x, READ), Operand(grad_out, READ)}, wanted);
    const size_t row_bytes = size_t(columns * element_bytes(computed));
    if (!wanted) {
        loop.run(threads, row_bytes, [&](const RowBlock<3> &rows, int64_t, char *scratch) {
            kernel(rows, weight.data(), bias.data(), eps, nullptr, scratch);
        });
        return;
    }
    const ColumnSums sums(loop.items(), 2 * columns, x.dtype);
    loop.run(
        threads, row_bytes, [&](int64_t item) { sums.clear(item); },
        [&](const RowBlock<3> &rows, int64_t item, char *scratch) {
            kernel(rows, weight.data(), bias.data(), eps, sums.of(item), scratch);
        });
    sums.add_up(threads, 0, columns, grad_weight->data);
    sums.add_up(threads, columns, columns, grad_bias->data);
}

} // namespace

#endif

} // namespace heedful

#if !defined(HEEDFUL_TIER)

extern "C" heedful_status heedful_layer_norm_gelu(const heedful_array *x, const heedful_array *weight,
                                                  const heedful_array *bias, double eps, int32_t tanh,
                                                  const heedful_array *out, const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::forward(*x, weight, bias, eps, tanh != 0, *out, threads); });
}

extern "C" heedful_status heedful_layer_norm_gelu_backward(const heedful_array *grad_out, const heedful_array *x,
                                                           const heedful_array *weight, const heedful_array *bias,
                                                           double eps, int32_t tanh, const heedful_array *grad_x,
                                                           const heedful_array *grad_weight,
                                                           const heedful_array *grad_bias,
                                                           const heedful_threads *threads) {
    return heedful::guarded([&] {
        heedful::backward(*grad_out, *x, weight, bias, eps, tanh != 0, *grad_x, grad_weight, grad_bias, threads);
    });
}

#endif
