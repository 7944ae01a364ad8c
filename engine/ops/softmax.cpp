// out = exp(s - max) / sum, s being x scaled, capped and masked; the gradient of s is out (g - sum(g out)).
#include "tiers.h"

#include "heedful_ops/softmax.h"
#include "rows.h"

namespace heedful {

enum MaskKind { NO_MASK, BOOL_MASK, OWN_MASK, WIDE_MASK }; // of x's dtype, or of the type that is computed in

struct SoftmaxKernels {
    // out, x, mask. softcap: 0 for none. scratch: a row in the type that is computed in.
    void (*forward[4])(const RowBlock<3> &rows, MaskKind mask, double scale, double softcap, void *scratch);
    void (*backward[4])(const RowBlock<5> &rows, double scale, double softcap); // grad_x, grad_scores, grad_out, out, x
};
HEEDFUL_KERNELS(SoftmaxKernels, softmax)

#if defined(HEEDFUL_TIER)

namespace {

// s where the byte is not 0, -inf elsewhere.
template <class T> INLINE typename Real<T>::V attended(const uint8_t *bytes, typename Real<T>::V s) {
#if defined(__AVX512F__)
    const __m128i kept = sizeof(T) == 4 ? _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes))
                                        : _mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes));
    return Real<T>::keep(s, _mm_test_epi8_mask(kept, kept));
#else
    typedef uint8_t Bytes __attribute__((vector_size(Real<T>::LANES)));
    Bytes kept;
    __builtin_memcpy(&kept, bytes, sizeof kept);
    return __builtin_convertvector(kept, typename Real<T>::I) != 0 ? s : Real<T>::set1(-__builtin_inff());
#endif
}
template <class T> INLINE typename Real<T>::V attended(Whole, const uint8_t *bytes, typename Real<T>::V s) {
    return attended<T>(bytes, s);
}
template <class T> INLINE typename Real<T>::V attended(Some part, const uint8_t *bytes, typename Real<T>::V s) {
    uint8_t some[Real<T>::LANES] = {};
    __builtin_memcpy(some, bytes, size_t(part.count));
    return attended<T>(some, s);
}

// exp(s - highest) for s up to highest: exactly 0 from 2^-126 down.
template <class T> INLINE typename Real<T>::V weight_of(typename Real<T>::V s, typename Real<T>::V highest) {
    return Real<T>::template exp2<5>((s - highest) * T(1.4426950408889634));
}

template <class In> struct Softmax {
    typedef typename ComputedIn<In>::type T;
    typedef typename Real<T>::V V;

    template <MaskKind MASK, bool CAPPED, class Part>
    static INLINE V score(const In *x, const void *mask, V scale, V softcap, int64_t i, Part part) {
        V s = part.load(x + i) * scale;
        if constexpr (CAPPED) s = softcap * tanh<T>(s / softcap);
        if constexpr (MASK == BOOL_MASK) s = attended<T>(part, static_cast<const uint8_t *>(mask) + i, s);
        if constexpr (MASK == OWN_MASK) s += part.load(static_cast<const In *>(mask) + i);
        if constexpr (MASK == WIDE_MASK) s += part.load(static_cast<const T *>(mask) + i);
        return s;
    }

    static constexpr int CHAINS = 4; // that do not wait for each other

    template <MaskKind MASK, bool CAPPED>
    static void values(const RowBlock<3> &rows, T scale_value, T softcap_value, T *scratch) {
        constexpr int64_t LANES = Real<T>::LANES;
        constexpr bool KEPT = MASK != NO_MASK || CAPPED; // scores that are cheap are taken twice
        const V scale = Real<T>::set1(scale_value), softcap = Real<T>::set1(softcap_value);
        const int64_t n = rows.columns;
        for (int64_t row = 0; row < rows.rows; ++row) {
            const In *const x = row_of<In>(rows, 1, row);
            const void *const mask = MASK == NO_MASK ? nullptr : row_of<char>(rows, 2, row);
            In *const out = row_of<In>(rows, 0, row);
            V chain[CHAINS];
            for (int c = 0; c < CHAINS; ++c) chain[c] = Real<T>::set1(-__builtin_inff());
            const auto look = [&](int64_t i, auto part, V &highest) {
                const V s = score<MASK, CAPPED>(x, mask, scale, softcap, i, part);
                if constexpr (KEPT) part.store(scratch + i, s);
                highest = Real<T>::max(highest, or_lowest(part, s));
            };
            int64_t i = 0;
            for (; i + CHAINS * LANES <= n; i += CHAINS * LANES)
#pragma GCC unroll 4
                for (int c = 0; c < CHAINS; ++c) look(i + c * LANES, Whole(), chain[c]);
            for (; i + LANES <= n; i += LANES) look(i, Whole(), chain[0]);
            if (i < n) look(i, Some{n - i}, chain[1]);
            const T found =
                Real<T>::reduce_max(Real<T>::max(Real<T>::max(chain[0], chain[1]), Real<T>::max(chain[2], chain[3])));
            const V highest = Real<T>::set1(found == T(-__builtin_inff()) ? T(0) : found);
            const T sum = sum_of<T>(n, [=](int64_t j, auto part) {
                const V s = KEPT ? part.load(scratch + j) : score<MASK, CAPPED>(x, mask, scale, softcap, j, part);
                const V weight = or_zero(part, weight_of<T>(s, highest));
                part.store(scratch + j, weight);
                return weight;
            });
            const V share = Real<T>::set1(sum == T(0) ? T(0) : T(1) / sum);
            for_vectors<T>(n, [=](int64_t j, auto part) { part.store(out + j, part.load(scratch + j) * share); });
        }
    }
    static void forward(const RowBlock<3> &rows, MaskKind mask, double scale, double softcap, void *scratch) {
        typedef void (*Run)(const RowBlock<3> &, T, T, T *);
        static const Run run[4][2] = {{values<NO_MASK, false>, values<NO_MASK, true>},
                                      {values<BOOL_MASK, false>, values<BOOL_MASK, true>},
                                      {values<OWN_MASK, false>, values<OWN_MASK, true>},
                                      {values<WIDE_MASK, false>, values<WIDE_MASK, true>}};
        run[mask][softcap != 0](rows, T(scale), T(softcap), static_cast<T *>(scratch));
    }

    template <bool CAPPED, bool SCORES> static void gradients(const RowBlock<5> &rows, T scale_value, T softcap_value) {
        const V scale = Real<T>::set1(scale_value), softcap = Real<T>::set1(softcap_value);
        const int64_t n = rows.columns;
        for (int64_t row = 0; row < rows.rows; ++row) {
            In *const grad_x = row_of<In>(rows, 0, row);
            T *const grad_scores = SCORES ? row_of<T>(rows, 1, row) : nullptr;
            const In *const grad_out = row_of<In>(rows, 2, row), *const out = row_of<In>(rows, 3, row);
            const In *const x = CAPPED ? row_of<In>(rows, 4, row) : nullptr;
            const V mean = Real<T>::set1(
                sum_of<T>(n, [=](int64_t i, auto part) { return part.load(grad_out + i) * part.load(out + i); }));
            for_vectors<T>(n, [=](int64_t i, auto part) {
                V grad = part.load(out + i) * (part.load(grad_out + i) - mean);
                if constexpr (SCORES) part.store(grad_scores + i, grad);
                grad *= scale;
                if constexpr (CAPPED) {
                    const V capped = tanh<T>(part.load(x + i) * scale / softcap);
                    grad *= T(1) - capped * capped;
                }
                part.store(grad_x + i, grad);
            });
        }
    }
    static void backward(const RowBlock<5> &rows, double scale, double softcap) {
        const auto run = softcap != 0 ? (rows.data[1] ? gradients<true, true> : gradients<true, false>)
                                      : (rows.data[1] ? gradients<false, true> : gradients<false, false>);
        run(rows, T(scale), T(softcap));
    }
};

} // namespace

const SoftmaxKernels HEEDFUL_TIER::softmax = {
    {Softmax<float>::forward, Softmax<bfloat16>::forward, Softmax<float16>::forward, Softmax<double>::forward},
    {Softmax<float>::backward, Softmax<bfloat16>::backward, Softmax<float16>::backward, Softmax<double>::backward},
};

#else

namespace {

const heedful_array NONE = {};

void check_softcap(double softcap) {
    REQUIRE(softcap >= 0 && softcap < __builtin_inf(), "softcap: takes a positive finite number, or 0 for none");
}

void forward(const heedful_array &x, const heedful_array *given, double scale, double softcap, const heedful_array &out,
             const heedful_threads *threads) {
    check_array("x", x);
    check_like("out", out, "x", x);
    check_softcap(softcap);
    const heedful_array &mask = given && given->data ? *given : NONE;
    const int32_t computed = computed_dtype(x.dtype);
    int64_t stride[MAX_DIMS] = {};
    MaskKind kind = NO_MASK;
    if (mask.data) {
        REQUIRE(mask.dtype == HEEDFUL_BOOL || mask.dtype == x.dtype || mask.dtype == computed,
                "mask: has dtype code " + std::to_string(mask.dtype) + ", takes bool, x's or " +
                    std::to_string(computed));
        kind = mask.dtype == HEEDFUL_BOOL ? BOOL_MASK : mask.dtype == x.dtype ? OWN_MASK : WIDE_MASK;
        REQUIRE(mask.ndim <= x.ndim, "mask: has more dimensions than x");
        for (int32_t dim = 0; dim < mask.ndim; ++dim) {
            const int32_t at = x.ndim - mask.ndim + dim;
            REQUIRE(mask.size[dim] == x.size[at] || mask.size[dim] == 1, "mask: takes a shape that broadcasts to x's");
            stride[at] = mask.size[dim] == 1 ? 0 : mask.stride[dim];
        }
    }
    const auto kernel = in_use_softmax().forward[x.dtype];
    const Rows loop(
        x.ndim, x.size,
        {Operand(out, WRITTEN), Operand(x, READ), Operand(mask.data, element_bytes(mask.dtype), stride, READ)});
    loop.run(threads, size_t(loop.columns() * element_bytes(computed)),
             [=](const RowBlock<3> &rows, int64_t, char *scratch) { kernel(rows, kind, scale, softcap, scratch); });
}

void backward(const heedful_array &grad_out, const heedful_array &out, const heedful_array *given, double scale,
              double softcap, const heedful_array &grad_x, const heedful_array *scores,
              const heedful_threads *threads) {
    check_array("out", out);
    check_like("grad_out", grad_out, "out", out);
    check_like("grad_x", grad_x, "out", out);
    check_softcap(softcap);
    const heedful_array &x = given && given->data && softcap != 0 ? *given : NONE;
    const heedful_array &grad_scores = scores && scores->data ? *scores : NONE;
    REQUIRE(x.data || softcap == 0 || count_elements(out) == 0, "x: softcap takes it");
    if (x.data) check_like("x", x, "out", out);
    if (grad_scores.data) {
        heedful_array wide = out;
        wide.dtype = computed_dtype(out.dtype);
        check_like("grad_scores", grad_scores, "out in the type that is computed in", wide);
    }
    const auto kernel = in_use_softmax().backward[out.dtype];
    const Rows loop(out.ndim, out.size,
                    {Operand(grad_x, WRITTEN), Operand(grad_scores, WRITTEN), Operand(grad_out, READ),
                     Operand(out, READ), Operand(x, READ)});
    loop.run(threads, 0, [=](const RowBlock<5> &rows, int64_t, char *) { kernel(rows, scale, softcap); });
}

} // namespace

#endif

} // namespace heedful

#if !defined(HEEDFUL_TIER)

extern "C" heedful_status heedful_softmax(const heedful_array *x, const heedful_array *mask, double scale,
                                          double softcap, const heedful_array *out, const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::forward(*x, mask, scale, softcap, *out, threads); });
}

extern "C" heedful_status heedful_softmax_backward(const heedful_array *grad_out, const heedful_array *out,
                                                   const heedful_array *x, double scale, double softcap,
                                                   const heedful_array *grad_x, const heedful_array *grad_scores,
                                                   const heedful_threads *threads) {
    return heedful::guarded(
        [&] { heedful::backward(*grad_out, *out, x, scale, softcap, *grad_x, grad_scores, threads); });
}

#endif
