// Functions that simd.h lacks, to the last bits whatever the argument, and parts of vectors. Included once by each
// tier's source of an operation, inside its anonymous namespace, after simd.h.

// The type that In is computed in.
template <class In> struct ComputedIn {
    typedef float type;
};
template <> struct ComputedIn<double> {
    typedef double type;
};

// Parts of an array as for_vectors hands them out: a whole vector, or the few elements at the end with zeros behind
// them.
struct Whole {
    template <class In> INLINE typename Real<typename ComputedIn<In>::type>::V load(const In *p) const {
        return widen(p);
    }
    template <class In> INLINE void store(In *p, typename Real<typename ComputedIn<In>::type>::V v) const {
        narrow(p, v);
    }
};
struct Some {
    int64_t count;
    template <class In> INLINE typename Real<typename ComputedIn<In>::type>::V load(const In *p) const {
        In some[Real<typename ComputedIn<In>::type>::LANES] = {};
        __builtin_memcpy(some, p, size_t(count) * sizeof(In));
        return widen(some);
    }
    template <class In> INLINE void store(In *p, typename Real<typename ComputedIn<In>::type>::V v) const {
        In some[Real<typename ComputedIn<In>::type>::LANES];
        narrow(some, v);
        __builtin_memcpy(p, some, size_t(count) * sizeof(In));
    }
};

// body(i, part) for runs of vectors of T over n elements: part.load(p + i) and part.store(p + i, v) convert.
template <class T, class Body> INLINE void for_vectors(int64_t n, Body body) {
    constexpr int LANES = Real<T>::LANES;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) body(i, Whole());
    if (i < n) body(i, Some{n - i});
}

template <class T> struct Exponential;
template <> struct Exponential<float> {
    typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    // ln 2 in two parts, of which n times the first is exact.
    static constexpr float HIGH = 0.693359375f, LOW = -2.1219444005e-4f, LOG2_E = 1.4426950409f;
    static constexpr float ROUND = 12582912.0f, LOWEST = -104.0f, HIGHEST = 89.0f;
    // (e^r - 1) / r for |r| <= ln 2 / 2: expm1_polynomial of simd.h for r log2 e. Errs by 1.1e-8, for double 2.5e-17.
    static constexpr float POLYNOMIAL[] = {0.0013933641f, 0.0083691485f, 0.041666465f, 0.16666505f, 0.5f, 1.0f};
};
template <> struct Exponential<double> {
    typedef uint64_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr double HIGH = 6.93145751953125e-1, LOW = 1.42860682030941723212e-6,
                            LOG2_E = 1.44269504088896340736;
    static constexpr double ROUND = 6755399441055744.0, LOWEST = -746.0, HIGHEST = 710.0;
    static constexpr double POLYNOMIAL[] = {2.510520637395701e-8,
                                            2.762635724144722e-7,
                                            2.7557255425746434e-6,
                                            2.4801504346997688e-5,
                                            0.000198412698748004920,
                                            0.00138888889324885982,
                                            0.00833333333332614088,
                                            0.0416666666665731426,
                                            0.166666666666666710,
                                            0.500000000000000562,
                                            1.0};
};

// Within lowest and highest, and NaN where x is.
template <class T>
INLINE typename Real<T>::V clamp(typename Real<T>::V x, typename Real<T>::V lowest, typename Real<T>::V highest) {
    typedef typename Real<T>::V V;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (V)_mm512_min_ps((__m512)highest, _mm512_max_ps((__m512)lowest, (__m512)x));
    else return (V)_mm512_min_pd((__m512d)highest, _mm512_max_pd((__m512d)lowest, (__m512d)x));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return (V)_mm256_min_ps((__m256)highest, _mm256_max_ps((__m256)lowest, (__m256)x));
    else return (V)_mm256_min_pd((__m256d)highest, _mm256_max_pd((__m256d)lowest, (__m256d)x));
#else
    const V above = x < lowest ? lowest : x;
    return above > highest ? highest : above;
#endif
}

INLINE Real<float>::V scale_by_power(Real<float>::V p, Real<float>::V n, Exponential<float>::Bits whole) {
#if defined(__AVX512F__)
    (void)whole;
    return (Real<float>::V)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    (void)n;
    typedef Real<float>::I I;
    const I half = (I)whole >> 1, rest = (I)whole - half; // 2^n alone may be out of range where the result is not
    return p * (Real<float>::V)((half + 127) << 23) * (Real<float>::V)((rest + 127) << 23);
#endif
}
INLINE Real<double>::V scale_by_power(Real<double>::V p, Real<double>::V n, Exponential<double>::Bits whole) {
#if defined(__AVX512F__)
    (void)whole;
    return (Real<double>::V)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#else
    (void)n;
    typedef Real<double>::I I;
    // Shifted by hand: AVX2 has no arithmetic shift of 64 bits. Both halves are at least -1075 / 2.
    const Exponential<double>::Bits half = ((whole + 2048) >> 1) - 1024, rest = whole - half;
    return p * (Real<double>::V)((I)((half + 1023) << 52)) * (Real<double>::V)((I)((rest + 1023) << 52));
#endif
}

// e^x within 2 units in the last place, for every x: subnormal results, 0, infinity and NaN as they should be.
template <class T> INLINE typename Real<T>::V exp(typename Real<T>::V x) {
    typedef typename Real<T>::V V;
    typedef Exponential<T> E;
    const V t = clamp<T>(x, Real<T>::set1(E::LOWEST), Real<T>::set1(E::HIGHEST));
    // The sum's lowest bits are the nearest whole number.
    const V shifted = t * E::LOG2_E + E::ROUND, n = shifted - E::ROUND;
    const typename E::Bits whole = (typename E::Bits)shifted - (typename E::Bits)Real<T>::set1(E::ROUND);
    const V r = (t - n * E::HIGH) - n * E::LOW;
    constexpr int TERMS = sizeof E::POLYNOMIAL / sizeof *E::POLYNOMIAL;
    V p = Real<T>::set1(E::POLYNOMIAL[0]);
#pragma GCC unroll 12
    for (int i = 1; i < TERMS; ++i) p = p * r + E::POLYNOMIAL[i];
    return scale_by_power(p * r + T(1), n, whole);
}

// The same for a result that is rounded to In: for 16 bits within 1e-5 of it, for half the instructions.
template <class In> INLINE auto exp_for(typename Real<typename ComputedIn<In>::type>::V x) {
    typedef typename ComputedIn<In>::type T;
#if defined(__AVX512F__)
    if constexpr (sizeof(In) == 2) return Real<T>::template exp2<4>(x * Exponential<T>::LOG2_E);
    else
#endif
        return exp<T>(x);
}

// x / y for a result that is rounded to In: for bfloat16 within 1/30 of its roundoff.
template <class In, class V> INLINE V quotient_for(V x, V y) {
#if defined(__AVX512F__)
    if constexpr (__is_same(In, bfloat16)) return x * (V)_mm512_rcp14_ps((__m512)y);
    else
#endif
        return x / y;
}

// 1 / (1 + e^-x), 0 where e^-x is out of range. What is missing to 1 is used too, so the quotient is a whole one.
template <class In> INLINE auto sigmoid_for(typename Real<typename ComputedIn<In>::type>::V x) {
    typedef typename ComputedIn<In>::type T;
    return T(1) / (T(1) + exp_for<In>(-x));
}

// The same and what is missing to 1, each with full relative precision for every x.
template <class T> struct SigmoidParts {
    typename Real<T>::V value, rest;
};
template <class T> INLINE SigmoidParts<T> sigmoid_parts(typename Real<T>::V x) {
    typedef typename Real<T>::V V;
    const V e = exp<T>(x < V{} ? x : -x), large = T(1) / (T(1) + e), small = e * large;
    return {x < V{} ? small : large, x < V{} ? large : small};
}

template <class In> struct NormalTail;
// e^(x^2 / 2) (x + MIDDLE) times the probability that a normal variable exceeds x, for x from 0 until e^(-x^2 / 2) is
// 0, as a polynomial of (x - MIDDLE) / (x + MIDDLE). Errs by 1.3e-8 (interpolated at Chebyshev's nodes), for double
// 1.2e-17; for 16 bits (least largest relative error) by 1/40 of their roundoff: 6.6e-6 and 4.7e-5.
template <> struct NormalTail<float> {
    static constexpr float MIDDLE = 4.0f;
    static constexpr int EXP_DEGREE = 5;
    static constexpr float POLYNOMIAL[] = {-0.000122983157f, 0.0001948018511f, 0.001569313645f, -0.003523574056f,
                                           -0.007527212912f, 0.06040646975f,   -0.1865230059f,  0.3871366798f,
                                           -0.6078966061f,   0.7552851385f};
};
template <> struct NormalTail<float16> {
    static constexpr float MIDDLE = 4.5f;
    static constexpr int EXP_DEGREE = 4;
    static constexpr float POLYNOMIAL[] = {-0.03409097659f, 0.1132910393f,  -0.2529208147f,
                                           0.4462060271f,   -0.6402704351f, 0.7632354786f};
};
template <> struct NormalTail<bfloat16> {
    static constexpr float MIDDLE = 4.0f;
    static constexpr int EXP_DEGREE = 4;
    static constexpr float POLYNOMIAL[] = {0.06039773197f, -0.189658357f, 0.3869738686f, -0.6076044707f, 0.7552853523f};
};
template <> struct NormalTail<double> {
    static constexpr double MIDDLE = 5.0;
    static constexpr int EXP_DEGREE = 5; // which Real<double> does not look at
    static constexpr double POLYNOMIAL[] = {
        -1.5877468827473365378e-10,  1.7530484014082319805e-9,  7.6630718007600410458e-9,   -9.3135609943260591435e-9,
        -6.5942216624772230429e-8,   4.2274993740065348384e-8,  4.3314103568625849535e-7,   -3.3661536810124711722e-7,
        -2.7692670959974302454e-6,   3.9809021578680411194e-6,  0.000016681213742042061453, -0.00004976281427058580517,
        -0.000059375728009915863678, 0.00054489906477312989385, -0.00079786939846607010544, -0.0029933767705085424387,
        0.020795066799883179639,     -0.069118638706310163575,  0.16502036617038471792,     -0.3135331566713045447,
        0.49530561596997641327,      -0.66538250289005670039,   0.76919304975006295856};
};

template <class T> INLINE typename Real<T>::V magnitude(typename Real<T>::V x) {
    typedef typename Exponential<T>::Bits Bits;
    return (typename Real<T>::V)((Bits)x & (~Bits{} >> 1));
}

// The normal distribution's Phi(x) = (1 + erf(x / sqrt(2))) / 2 with full relative precision of In on both sides, but
// for the roundings of x^2 / 2 in its exponential, and its density. Each below 2^-126, for double 2^-1022, may be 0.
template <class T> struct NormalParts {
    typename Real<T>::V below, density;
};
template <class In>
INLINE NormalParts<typename ComputedIn<In>::type> normal_parts(typename Real<typename ComputedIn<In>::type>::V x) {
    typedef typename ComputedIn<In>::type T;
    typedef typename Real<T>::V V;
    typedef NormalTail<In> N;
    const V size = magnitude<T>(x);
    const V power = Real<T>::template exp2<N::EXP_DEGREE>(size * size * T(-0.72134752044448170368)); // log2(e) / 2
    const V inverse = quotient_for<In>(Real<T>::set1(1), size + N::MIDDLE), t = T(1) - T(2 * N::MIDDLE) * inverse;
    constexpr int TERMS = sizeof N::POLYNOMIAL / sizeof *N::POLYNOMIAL;
    V p = Real<T>::set1(N::POLYNOMIAL[0]);
#pragma GCC unroll 24
    for (int i = 1; i < TERMS; ++i) p = p * t + N::POLYNOMIAL[i];
    const V tail = power * (p * inverse);
    return {x < V{} ? tail : T(1) - tail, power * T(0.398942280401432677939946)};
}
