// out = r x w with r = (mean(x^2) + eps)^(-1/2), and its gradients: r g w - r^3 x mean(g w x) for x and the sum over
// rows of g r x for w. r is cheaper to take again than to keep: the sums need one pass over x anyway.
#include "tiers.h"

#include "heedful_ops/rms_norm.h"
#include "rows.h"

namespace heedful {

struct RmsNormKernels {
    // By heedful_dtype. weight is in the type that is computed in.
    void (*forward[4])(const RowBlock<2> &rows, const void *weight, double eps);     // out, x
    void (*add_forward[4])(const RowBlock<4> &rows, const void *weight, double eps); // out, sum, x, residual
    // grad_x, x, grad_out, added. Adds the gradient of weight to sums where they are not null.
    void (*backward[4])(const RowBlock<4> &rows, const void *weight, double eps, void *sums);
    void (*widen[4])(const void *from, void *to, int64_t n);
};
HEEDFUL_KERNELS(RmsNormKernels, rms_norm)

#if defined(HEEDFUL_TIER)

namespace {

template <class In> struct RmsNorm {
    typedef typename ComputedIn<In>::type T;
    typedef typename Real<T>::V V;

    static INLINE void scale(const In *x, const T *weight, In *out, T squares, T eps, int64_t n) {
        const V r = Real<T>::set1(T(1) / square_root(squares / T(n) + eps));
        for_vectors<T>(
            n, [=](int64_t i, auto part) { part.store(out + i, part.load(x + i) * r * part.load(weight + i)); });
    }

    static void forward(const RowBlock<2> &rows, const void *weight, double eps) {
        for (int64_t row = 0; row < rows.rows; ++row) {
            const In *const x = row_of<In>(rows, 1, row);
            const T squares = sum_of<T>(rows.columns, [=](int64_t i, auto part) {
                const V v = part.load(x + i);
                return v * v;
            });
            scale(x, static_cast<const T *>(weight), row_of<In>(rows, 0, row), squares, T(eps), rows.columns);
        }
    }

    static void add_forward(const RowBlock<4> &rows, const void *weight, double eps) {
        for (int64_t row = 0; row < rows.rows; ++row) {
            const In *const x = row_of<In>(rows, 2, row), *const residual = row_of<In>(rows, 3, row);
            In *const sum = row_of<In>(rows, 1, row);
            // What is normed is the sum as it is kept.
            const T squares = sum_of<T>(rows.columns, [=](int64_t i, auto part) {
                part.store(sum + i, part.load(x + i) + part.load(residual + i));
                const V v = part.load(sum + i);
                return v * v;
            });
            scale(sum, static_cast<const T *>(weight), row_of<In>(rows, 0, row), squares, T(eps), rows.columns);
        }
    }

    template <bool ADDED, bool SUMS>
    static void gradients(const RowBlock<4> &rows, const T *weight, T eps, T *grad_weight) {
        const int64_t n = rows.columns;
        for (int64_t row = 0; row < rows.rows; ++row) {
            const In *const x = row_of<In>(rows, 1, row), *const grad_out = row_of<In>(rows, 2, row);
            const In *const added = ADDED ? row_of<In>(rows, 3, row) : nullptr;
            In *const grad_x = row_of<In>(rows, 0, row);
            T sums[2]; // of x^2 and of g w x
            sums_of<T>(n, sums, [=](int64_t i, auto part, V(&terms)[2]) {
                const V v = part.load(x + i);
                terms[0] = v * v;
                terms[1] = part.load(grad_out + i) * part.load(weight + i) * v;
            });
            const T rate = T(1) / square_root(sums[0] / T(n) + eps);
            const V r = Real<T>::set1(rate), back = Real<T>::set1(rate * rate * (sums[1] / T(n)));
            for_vectors<T>(n, [=](int64_t i, auto part) {
                const V normed = part.load(x + i) * r, g = part.load(grad_out + i);
                V grad = r * (g * part.load(weight + i)) - back * normed;
                if constexpr (ADDED) grad += part.load(added + i);
                part.store(grad_x + i, grad);
                if constexpr (SUMS) part.store(grad_weight + i, part.load(grad_weight + i) + g * normed);
            });
        }
    }
    static void backward(const RowBlock<4> &rows, const void *weight, double eps, void *sums) {
        const auto run = rows.data[3] ? (sums ? gradients<true, true> : gradients<true, false>)
                                      : (sums ? gradients<false, true> : gradients<false, false>);
        run(rows, static_cast<const T *>(weight), T(eps), static_cast<T *>(sums));
    }
};

} // namespace

const RmsNormKernels HEEDFUL_TIER::rms_norm = {
    {RmsNorm<float>::forward, RmsNorm<bfloat16>::forward, RmsNorm<float16>::forward, RmsNorm<double>::forward},
    {RmsNorm<float>::add_forward, RmsNorm<bfloat16>::add_forward, RmsNorm<float16>::add_forward,
     RmsNorm<double>::add_forward},
    {RmsNorm<float>::backward, RmsNorm<bfloat16>::backward, RmsNorm<float16>::backward, RmsNorm<double>::backward},
    {widen_all<float>, widen_all<bfloat16>, widen_all<float16>, widen_all<double>},
};

#else

namespace {

void check_rows(const heedful_array &x) {
    check_array("x", x);
    REQUIRE(x.ndim > 0, "x: has no dimension, takes 1 or more");
}

void forward(const heedful_array &x, const heedful_array *given, double eps, const heedful_array &out,
             const heedful_threads *threads) {
    check_rows(x);
    check_like("out", out, "x", x);
    const RmsNormKernels &kernels = in_use_rms_norm();
    const Columns weight("weight", given, 1.0, x, kernels.widen);
    const auto kernel = kernels.forward[x.dtype];
    const Rows loop(x.ndim, x.size, {Operand(out, WRITTEN), Operand(x, READ)});
    loop.run(threads, 0, [&](const RowBlock<2> &rows, int64_t, char *) { kernel(rows, weight.data(), eps); });
}

void add_forward(const heedful_array &x, const heedful_array &residual, const heedful_array *given, double eps,
                 const heedful_array &out, const heedful_array &sum, const heedful_threads *threads) {
    check_rows(x);
    check_like("residual", residual, "x", x);
    check_like("out", out, "x", x);
    check_like("sum", sum, "x", x);
    const RmsNormKernels &kernels = in_use_rms_norm();
    const Columns weight("weight", given, 1.0, x, kernels.widen);
    const auto kernel = kernels.add_forward[x.dtype];
    const Rows loop(x.ndim, x.size,
                    {Operand(out, WRITTEN), Operand(sum, WRITTEN), Operand(x, READ), Operand(residual, READ)});
    loop.run(threads, 0, [&](const RowBlock<4> &rows, int64_t, char *) { kernel(rows, weight.data(), eps); });
}

void backward(const heedful_array &grad_out, const heedful_array *added, const heedful_array &x,
              const heedful_array *given, double eps, const heedful_array &grad_x, const heedful_array *grad_weight,
              const heedful_threads *threads) {
    check_rows(x);
    check_like("grad_out", grad_out, "x", x);
    check_like("grad_x", grad_x, "x", x);
    heedful_array none = {};
    if (added && added->data) check_like("added", *added, "x", x);
    else added = &none;
    const int64_t columns = x.size[x.ndim - 1];
    const bool wanted = grad_weight && grad_weight->data;
    if (wanted) check_result("grad_weight", *grad_weight, columns, computed_dtype(x.dtype));
    const RmsNormKernels &kernels = in_use_rms_norm();
    const Columns weight("weight", given, 1.0, x, kernels.widen);
    const auto kernel = kernels.backward[x.dtype];
    const Rows loop(x.ndim, x.size,
                    {Operand(grad_x, WRITTEN), Operand(x, READ), Operand(grad_out, READ), Operand(*added, READ)},
                    wanted);
    if (!wanted) {
        loop.run(threads, 0,
                 [&](const RowBlock<4> &rows, int64_t, char *) { kernel(rows, weight.data(), eps, nullptr); });
        return;
    }
    const ColumnSums sums(loop.items(), columns, x.dtype);
    loop.run(
        threads, 0, [&](int64_t item) { sums.clear(item); },
        [&](const RowBlock<4> &rows, int64_t item, char *) { kernel(rows, weight.data(), eps, sums.of(item)); });
    sums.add_up(threads, 0, columns, grad_weight->data);
}

} // namespace

#endif

} // namespace heedful

#if !defined(HEEDFUL_TIER)

extern "C" heedful_status heedful_rms_norm(const heedful_array *x, const heedful_array *weight, double eps,
                                           const heedful_array *out, const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::forward(*x, weight, eps, *out, threads); });
}

extern "C" heedful_status heedful_add_rms_norm(const heedful_array *x, const heedful_array *residual,
                                               const heedful_array *weight, double eps, const heedful_array *out,
                                               const heedful_array *sum, const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::add_forward(*x, *residual, weight, eps, *out, *sum, threads); });
}

extern "C" heedful_status heedful_rms_norm_backward(const heedful_array *grad_out, const heedful_array *added,
                                                    const heedful_array *x, const heedful_array *weight, double eps,
                                                    const heedful_array *grad_x, const heedful_array *grad_weight,
                                                    const heedful_threads *threads) {
    return heedful::guarded(
        [&] { heedful::backward(*grad_out, added, *x, weight, eps, *grad_x, grad_weight, threads); });
}

#endif
