// out = x * sigmoid(beta * x), and its gradients: with s the sigmoid and t = beta * x, s + t s (1 - s) for x and
// x^2 s (1 - s) for beta.
#include "tiers.h"

#include "heedful_ops/parametric_swish.h"

namespace heedful {

struct SwishKernels {
    // By heedful_dtype. betas is in the type that is computed in, one for each element or one for all.
    void (*forward[4])(const void *x, const void *betas, bool one, void *out, int64_t n);
    // Adds each element's share of the gradient of beta to sums where it is not null, to the first one where one.
    void (*backward[4])(const void *grad_out, const void *x, const void *betas, bool one, void *grad_x, double *sums,
                        int64_t n);
    void (*widen[4])(const void *from, void *to, int64_t n); // to the type that is computed in
};
HEEDFUL_KERNELS(SwishKernels, parametric_swish)

#if defined(HEEDFUL_TIER)

namespace {

template <class In> struct Swish {
    typedef typename ComputedIn<In>::type T;
    typedef typename Real<T>::V V;

    template <bool ONE> static void values(const In *x, const T *betas, In *out, int64_t n) {
        const V beta = Real<T>::set1(betas[0]);
        for_vectors<T>(n, [=](int64_t i, auto part) {
            const V v = part.load(x + i);
            part.store(out + i, quotient_for<In>(v, T(1) + exp_for<In>(-v * (ONE ? beta : part.load(betas + i)))));
        });
    }
    static void forward(const void *x, const void *betas, bool one, void *out, int64_t n) {
        const auto run = one ? values<true> : values<false>;
        run(static_cast<const In *>(x), static_cast<const T *>(betas), static_cast<In *>(out), n);
    }

    // Writes each element's share of the gradient of beta to shares.
    template <bool ONE, bool SHARES>
    static void gradients(const In *grad_out, const In *x, const T *betas, In *grad_x, T *shares, int64_t n) {
        const V beta = Real<T>::set1(betas[0]);
        for_vectors<T>(n, [=](int64_t i, auto part) {
            const V v = part.load(x + i), g = part.load(grad_out + i);
            const V t = v * (ONE ? beta : part.load(betas + i));
            if constexpr (SHARES) {
                const SigmoidParts<T> s = sigmoid_parts<T>(t);
                part.store(shares + i, g * ((v * s.value) * (v * s.rest)));
                part.store(grad_x + i, g * (s.value + t * s.value * s.rest));
            } else {
                const V s = sigmoid_for<In>(t);
                part.store(grad_x + i, g * s * (T(1) + t * (T(1) - s)));
            }
        });
    }
    template <bool ONE> static void add_up(const T *shares, double *sums, int64_t n) {
        double sum[4] = {};
        int64_t i = 0;
        for (; ONE && i + 4 <= n; i += 4)
            for (int64_t lane = 0; lane < 4; ++lane) sum[lane] += double(shares[i + lane]);
        for (; i < n; ++i) (ONE ? sum[0] : sums[i]) += double(shares[i]);
        if (ONE) *sums += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    template <bool ONE>
    static void summed(const In *grad_out, const In *x, const T *betas, In *grad_x, double *sums, int64_t n) {
        if (!sums) return gradients<ONE, false>(grad_out, x, betas, grad_x, nullptr, n);
        constexpr int64_t BLOCK = 512;
        T shares[BLOCK];
        for (int64_t i = 0; i < n; i += BLOCK) {
            const int64_t count = n - i < BLOCK ? n - i : BLOCK;
            gradients<ONE, true>(grad_out + i, x + i, ONE ? betas : betas + i, grad_x + i, shares, count);
            add_up<ONE>(shares, ONE ? sums : sums + i, count);
        }
    }
    static void backward(const void *grad_out, const void *x, const void *betas, bool one, void *grad_x, double *sums,
                         int64_t n) {
        const auto run = one ? summed<true> : summed<false>;
        run(static_cast<const In *>(grad_out), static_cast<const In *>(x), static_cast<const T *>(betas),
            static_cast<In *>(grad_x), sums, n);
    }

    static void widen(const void *from, void *to, int64_t n) {
        for_vectors<T>(n, [=](int64_t i, auto part) {
            part.store(static_cast<T *>(to) + i, part.load(static_cast<const In *>(from) + i));
        });
    }
};

} // namespace

const SwishKernels HEEDFUL_TIER::parametric_swish = {
    {Swish<float>::forward, Swish<bfloat16>::forward, Swish<float16>::forward, Swish<double>::forward},
    {Swish<float>::backward, Swish<bfloat16>::backward, Swish<float16>::backward, Swish<double>::backward},
    {Swish<float>::widen, Swish<bfloat16>::widen, Swish<float16>::widen, Swish<double>::widen},
};

#else

namespace {

// The betas of a call in the type that is computed in, and their strides along x's dimensions.
struct Betas {
    alignas(8) char one[8];
    std::vector<double> many; // room for as many numbers of either type
    int64_t stride[MAX_DIMS] = {};
    int64_t count = 1;

    Betas(const heedful_array &x, const heedful_array *given, double beta, int32_t dim) {
        check_array("x", x);
        REQUIRE(dim >= 0 && dim < std::max(x.ndim, 1), "dim: is " + std::to_string(dim) + ", takes a dimension of x");
        const bool wide = x.dtype == HEEDFUL_FLOAT64;
        if (!given || !given->data) {
            const float narrow = float(beta);
            std::memcpy(one, wide ? static_cast<const void *>(&beta) : &narrow, wide ? 8 : 4);
            return;
        }
        check_array("betas", *given);
        count = count_elements(*given);
        const int64_t channels = x.ndim > 0 ? x.size[dim] : 1;
        REQUIRE(given->ndim <= 1 && (count == 1 || count == channels),
                "betas: has " + std::to_string(count) + " elements, takes 1 or " + std::to_string(channels) +
                    " in one dimension");
        REQUIRE(given->dtype == x.dtype || given->dtype == computed_dtype(x.dtype),
                "betas: has dtype code " + std::to_string(given->dtype) + ", takes x's or " +
                    std::to_string(computed_dtype(x.dtype)));
        if (count > 1) stride[dim] = 1;
        many.resize(size_t(count));
        const int64_t step = given->ndim > 0 ? given->stride[0] : 1;
        const auto widen = in_use_parametric_swish().widen[given->dtype];
        const char *const from = static_cast<const char *>(given->data);
        const int64_t bytes = element_bytes(given->dtype), wide_bytes = element_bytes(computed_dtype(x.dtype));
        if (step == 1 || count == 1) {
            widen(from, data(), count);
        } else {
            for (int64_t i = 0; i < count; ++i)
                widen(from + i * step * bytes, static_cast<char *>(data()) + i * wide_bytes, 1);
        }
    }
    void *data() { return many.empty() ? static_cast<void *>(one) : many.data(); }
    Operand operand(const heedful_array &x) {
        return Operand(data(), element_bytes(computed_dtype(x.dtype)), stride, READ_EQUAL);
    }
};

void forward(const heedful_array &x, const heedful_array *given, double beta, int32_t dim, const heedful_array &out,
             const heedful_threads *threads) {
    Betas betas(x, given, beta, dim);
    check_like("out", out, "x", x);
    const auto kernel = in_use_parametric_swish().forward[x.dtype];
    const Loop loop(x.ndim, x.size, {Operand(out, WRITTEN), Operand(x, READ), betas.operand(x)});
    loop.run(threads, [=](const Run<3> &run) { kernel(run.data[1], run.data[2], !run.step[2], run.data[0], run.n); });
}

// The gradient of beta in parts, which are added up in order: of a group of rows where a run has its own beta for each
// element, otherwise of a work item.
void backward(const heedful_array &grad_out, const heedful_array &x, const heedful_array *given, double beta,
              int32_t dim, const heedful_array &grad_x, const heedful_array *grad_betas,
              const heedful_threads *threads) {
    Betas betas(x, given, beta, dim);
    check_like("grad_out", grad_out, "x", x);
    check_like("grad_x", grad_x, "x", x);
    const bool wanted = grad_betas && grad_betas->data;
    if (wanted) check_result("grad_betas", *grad_betas, betas.count, computed_dtype(x.dtype));
    const auto kernel = in_use_parametric_swish().backward[x.dtype];
    const Loop loop(x.ndim, x.size,
                    {Operand(grad_x, WRITTEN), Operand(x, READ), Operand(grad_out, READ), betas.operand(x)},
                    wanted && betas.count > 1 ? 64 : 1);
    if (!wanted) {
        loop.run(threads, [=](const Run<4> &run) {
            kernel(run.data[2], run.data[1], run.data[3], !run.step[3], run.data[0], nullptr, run.n);
        });
        return;
    }
    const int64_t count = betas.count, bytes = element_bytes(computed_dtype(x.dtype));
    const bool along = count > 1 && loop.step(3) == 1;
    const int64_t parts = along ? loop.groups() : loop.items();
    const ScratchBlock scratch(size_t(std::max<int64_t>(parts * count, 1)) * sizeof(double));
    double *const sums = reinterpret_cast<double *>(scratch.data());
    const char *const base = static_cast<const char *>(betas.data());
    loop.run(
        threads,
        [=](const Run<4> &run) {
            const int64_t first = along ? run.group * count + run.column : run.item * count;
            std::fill_n(sums + first, along ? run.n : count, 0.0);
        },
        [=](const Run<4> &run) {
            // A run that has one beta knows which by where it lies.
            const int64_t which = along ? run.column : (run.data[3] - base) / bytes;
            kernel(run.data[2], run.data[1], run.data[3], !run.step[3], run.data[0],
                   sums + (along ? run.group : run.item) * count + which, run.n);
        });
    for (int64_t i = 0; i < count; ++i) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += sums[part * count + i];
        if (x.dtype == HEEDFUL_FLOAT64) static_cast<double *>(grad_betas->data)[i] = sum;
        else static_cast<float *>(grad_betas->data)[i] = float(sum);
    }
}

} // namespace

#endif

} // namespace heedful

#if !defined(HEEDFUL_TIER)

extern "C" heedful_status heedful_parametric_swish(const heedful_array *x, const heedful_array *betas, double beta,
                                                   int32_t dim, const heedful_array *out,
                                                   const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::forward(*x, betas, beta, dim, *out, threads); });
}

extern "C" heedful_status heedful_parametric_swish_backward(const heedful_array *grad_out, const heedful_array *x,
                                                            const heedful_array *betas, double beta, int32_t dim,
                                                            const heedful_array *grad_x,
                                                            const heedful_array *grad_betas,
                                                            const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::backward(*grad_out, *x, betas, beta, dim, *grad_x, grad_betas, threads); });
}

#endif
