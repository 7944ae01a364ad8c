// Vectors of one tier: GCC's vector types for what every machine has, and intrinsics for the leaves that
// differ. Included once by each tier's source, inside its anonymous namespace.

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

template <class To, class From> INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

INLINE float to_float(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

INLINE bfloat16 to_bfloat16(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#if defined(__F16C__)
INLINE float to_float(float16 x) { return _cvtsh_ss(x.bits); }
INLINE float16 to_float16(float x) { return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))}; }
#elif defined(HEEDFUL_TIER_NEON)
INLINE float to_float(float16 x) { return float(bit_cast<__fp16>(x.bits)); }
INLINE float16 to_float16(float x) { return {bit_cast<uint16_t>(__fp16(x))}; }
#else
INLINE float to_float(float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    // Shifting the exponent into place and scaling by 2^112 also makes half's subnormals normal.
    const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
    return bit_cast<float>(sign | (magnitude >= 0x7c00 ? magnitude << 13 | 0x7f800000 : bit_cast<uint32_t>(scaled)));
}

INLINE float16 to_float16(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
    if (magnitude < 0x38800000) // subnormal in half: adding 0.5 leaves the rounded value in the low bits
        return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}
#endif

template <int... I> struct Lanes {};
template <int N, int... I> struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I> struct MakeLanes<0, I...> {
    typedef Lanes<I...> type;
};

// N elements of T in one register: loads, stores and rearrangement, which need no arithmetic.
template <class T> struct Words {
    static constexpr int LANES = VECTOR_BYTES / sizeof(T);
    typedef T V __attribute__((vector_size(VECTOR_BYTES)));
    typedef T Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));

    static INLINE V load(const T *p) { return *reinterpret_cast<const Unaligned *>(p); }
    static INLINE void store(T *p, V v) { *reinterpret_cast<Unaligned *>(p) = v; }
    static INLINE V set1(T x) { return x - V{}; }

    // Halves added until one lane is left, the same order on every tier with as many lanes.
    static INLINE T reduce_add(V v) {
        T lane[LANES];
        store(lane, v);
        for (int width = LANES / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
        return lane[0];
    }

    // Swaps the off-diagonal quarters of every 2S x 2S block of the square that a and b are rows of.
    template <int S, int... I> static INLINE void exchange(V &a, V &b, Lanes<I...>) {
        const V low = __builtin_shufflevector(a, b, ((I & S) ? LANES + I - S : I)...);
        const V high = __builtin_shufflevector(a, b, ((I & S) ? LANES + I : I + S)...);
        a = low;
        b = high;
    }

    template <int S> static INLINE void transpose_stage(V *row) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i)
            if (!(i & S)) exchange<S>(row[i], row[i + S], typename MakeLanes<LANES>::type());
    }

    static INLINE void transpose(V *row) {
        transpose_stage<1>(row);
        if constexpr (LANES > 2) transpose_stage<2>(row);
        if constexpr (LANES > 4) transpose_stage<4>(row);
        if constexpr (LANES > 8) transpose_stage<8>(row);
    }
};

template <class T> struct Real;

// Polynomials are minimax in relative error for 2^f on [0, 1) (Remez): degree 4 errs by 2.6e-6, 5 by
// 7.5e-8, 11 by 3.1e-18.
template <> struct Real<float> : Words<float> {
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));

    static INLINE V max(V a, V b) {
#if defined(__AVX512F__)
        return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
        return (V)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(HEEDFUL_TIER_NEON)
        return (V)vmaxnmq_f32((float32x4_t)a, (float32x4_t)b);
#else
        return a > b ? a : b;
#endif
    }

    // Lanes whose bit is set, -inf elsewhere.
    static INLINE V keep(V x, uint32_t bits) {
        const V negative_infinity = set1(-__builtin_inff());
#if defined(__AVX512F__)
        return (V)_mm512_mask_blend_ps(__mmask16(bits), (__m512)negative_infinity, (__m512)x);
#else
        I lane_bit;
        for (int lane = 0; lane < LANES; ++lane) lane_bit[lane] = 1 << lane;
        return ((I{} + int32_t(bits)) & lane_bit) != 0 ? x : negative_infinity;
#endif
    }

    // Lanes whose bit is set, 0 elsewhere.
    static INLINE V keep_or_zero(V x, uint32_t bits) {
#if defined(__AVX512F__)
        return (V)_mm512_maskz_mov_ps(__mmask16(bits), (__m512)x);
#else
        I lane_bit;
        for (int lane = 0; lane < LANES; ++lane) lane_bit[lane] = 1 << lane;
        return (V)((((I{} + int32_t(bits)) & lane_bit) != 0) & (I)x);
#endif
    }

    // A bit for each lane that is not -inf.
    static INLINE uint32_t above_negative_infinity(V x) {
#if defined(__AVX512F__)
        return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
#elif defined(__AVX2__)
        return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ));
#else
        uint32_t bits = 0;
        for (int lane = 0; lane < LANES; ++lane) bits |= uint32_t(x[lane] != -__builtin_inff()) << lane;
        return bits;
#endif
    }

    // (2^f - 1) / f on [-1/2, 1/2], near-minimax: errs by 1.1e-8.
    static INLINE V expm1_polynomial(V f) {
        V p = set1(0.0001545316294512069f);
        p = p * f + 0.001339086336467123f;
        p = p * f + 0.00961808255727785f;
        p = p * f + 0.05550357114219078f;
        p = p * f + 0.2402265076056813f;
        return p * f + 0.6931471880262288f;
    }
    static constexpr int MANTISSA = 23, BIAS = 127;

    template <int DEGREE> static INLINE V polynomial(V f) {
        V p;
        if constexpr (DEGREE == 4) {
            p = set1(0.01353416785f);
            p = p * f + 0.05201146078f;
            p = p * f + 0.2414427568f;
            p = p * f + 0.6930038345f;
            p = p * f + 1.000002593f;
        } else {
            p = set1(0.001877576766f);
            p = p * f + 0.008989339877f;
            p = p * f + 0.05582631823f;
            p = p * f + 0.240153617f;
            p = p * f + 0.6931530732f;
            p = p * f + 0.9999999251f;
        }
        return p;
    }

    // 2^x for x <= a few: exactly 0 below 2^-126 or so and for -inf; NaN stays NaN.
    template <int DEGREE> static INLINE V exp2(V x) {
#if defined(__AVX512DQ__)
        const V f = (V)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        return (V)_mm512_scalef_ps((__m512)polynomial<DEGREE>(f), (__m512)x);
#else
        const V lowest = set1(-126.0f);
        const V t = x < lowest ? lowest : x;
#if defined(__AVX2__)
        const V whole = (V)_mm256_floor_ps((__m256)t);
        const I n = (I)_mm256_cvttps_epi32((__m256)whole);
#elif defined(HEEDFUL_TIER_NEON)
        const V whole = (V)vrndmq_f32((float32x4_t)t);
        const I n = (I)vcvtq_s32_f32((float32x4_t)whole);
#else
        I n = __builtin_convertvector(t, I);
        n += __builtin_convertvector(n, V) > t; // a comparison that holds is -1
        const V whole = __builtin_convertvector(n, V);
#endif
        const V p = polynomial<DEGREE>(t - whole);
        typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES))); // wraps for an x that is out of range
        const V scaled = (V)((Bits)p + ((Bits)n << 23));
        return x < lowest ? V{} : scaled;
#endif
    }

    static INLINE float reduce_max(V v) {
#if defined(__AVX512F__)
        return _mm512_reduce_max_ps((__m512)v);
#elif defined(HEEDFUL_TIER_NEON)
        return vmaxnmvq_f32((float32x4_t)v);
#else
        float m = v[0];
        for (int lane = 1; lane < LANES; ++lane) m = m > v[lane] ? m : v[lane];
        return m;
#endif
    }
    static INLINE float log2(float x) { return __builtin_log2f(x); }
};

template <> struct Real<double> : Words<double> {
    typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));

    static INLINE V max(V a, V b) {
#if defined(__AVX512F__)
        return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(HEEDFUL_TIER_NEON)
        return (V)vmaxnmq_f64((float64x2_t)a, (float64x2_t)b);
#else
        return a > b ? a : b;
#endif
    }

    static INLINE V keep(V x, uint32_t bits) {
        const V negative_infinity = set1(-__builtin_inf());
#if defined(__AVX512F__)
        return (V)_mm512_mask_blend_pd(__mmask8(bits), (__m512d)negative_infinity, (__m512d)x);
#else
        I lane_bit;
        for (int lane = 0; lane < LANES; ++lane) lane_bit[lane] = 1 << lane;
        return ((I{} + int64_t(bits)) & lane_bit) != 0 ? x : negative_infinity;
#endif
    }

    static INLINE V keep_or_zero(V x, uint32_t bits) {
#if defined(__AVX512F__)
        return (V)_mm512_maskz_mov_pd(__mmask8(bits), (__m512d)x);
#else
        I lane_bit;
        for (int lane = 0; lane < LANES; ++lane) lane_bit[lane] = 1 << lane;
        return (V)((((I{} + int64_t(bits)) & lane_bit) != 0) & (I)x);
#endif
    }

    static INLINE uint32_t above_negative_infinity(V x) {
        uint32_t bits = 0;
        for (int lane = 0; lane < LANES; ++lane) bits |= uint32_t(x[lane] != -__builtin_inf()) << lane;
        return bits;
    }

    // As for float; errs by 1.8e-17.
    static INLINE V expm1_polynomial(V f) {
        V p = set1(4.454960598186518394e-10);
        p = p * f + 7.0725859492692237e-9;
        p = p * f + 1.017806244584577352e-7;
        p = p * f + 1.321544258792168965e-6;
        p = p * f + 0.00001525273382983611839;
        p = p * f + 0.0001540353044173605015;
        p = p * f + 0.001333355814641693531;
        p = p * f + 0.009618129107606888527;
        p = p * f + 0.05550410866482159434;
        p = p * f + 0.2402265069591009822;
        return p * f + 0.6931471805599453094;
    }
    static constexpr int MANTISSA = 52, BIAS = 1023;

    template <int DEGREE> static INLINE V polynomial(V f) {
        V p = set1(6.27243695713783512e-10);
        p = p * f + 6.5544557538570504e-9;
        p = p * f + 1.02544577142324723e-7;
        p = p * f + 1.320819344985004e-6;
        p = p * f + 0.0000152531902527511925;
        p = p * f + 0.000154035114462742881;
        p = p * f + 0.00133335586615834706;
        p = p * f + 0.00961812909879244896;
        p = p * f + 0.0555041086657111632;
        p = p * f + 0.240226506959054712;
        p = p * f + 0.693147180559946235;
        return p * f + 1.0;
    }

    template <int DEGREE> static INLINE V exp2(V x) {
#if defined(__AVX512DQ__)
        const V f = (V)_mm512_reduce_pd((__m512d)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        return (V)_mm512_scalef_pd((__m512d)polynomial<DEGREE>(f), (__m512d)x);
#else
        const V lowest = set1(-1022.0);
        const V t = x < lowest ? lowest : x;
#if defined(HEEDFUL_TIER_NEON)
        const V whole = (V)vrndmq_f64((float64x2_t)t);
        const I n = (I)vcvtq_s64_f64((float64x2_t)whole);
#else
        I n = __builtin_convertvector(t, I);
        n += __builtin_convertvector(n, V) > t;
        const V whole = __builtin_convertvector(n, V);
#endif
        const V p = polynomial<DEGREE>(t - whole);
        typedef uint64_t Bits __attribute__((vector_size(VECTOR_BYTES)));
        const V scaled = (V)((Bits)p + ((Bits)n << 52));
        return x < lowest ? V{} : scaled;
#endif
    }

    static INLINE double reduce_max(V v) {
        double m = v[0];
        for (int lane = 1; lane < LANES; ++lane) m = m > v[lane] ? m : v[lane];
        return m;
    }
    static INLINE double log2(double x) { return __builtin_log2(x); }
};

// tanh by way of e^2x - 1, which keeps the relative precision of small x; NaN stays NaN.
template <class T> INLINE typename Real<T>::V tanh(typename Real<T>::V x) {
    typedef typename Real<T>::V V;
    typedef typename Real<T>::I I;
    const V size = x < V{} ? -x : x, limit = Real<T>::set1(120);
    V t = size * T(2.885390081777926815); // 2 log2(e)
    t = t > limit ? limit : t;
    const I n = __builtin_convertvector(t + T(0.5), I);
    const V f = t - __builtin_convertvector(n, V);
    const V power = (V)((n + Real<T>::BIAS) << Real<T>::MANTISSA);
    const V minus_one = power * (f * Real<T>::expm1_polynomial(f)) + (power - T(1));
    const V positive = minus_one / (minus_one + T(2));
    return x < V{} ? -positive : positive;
}

// Inputs widened to the type that is computed in, and results narrowed back.
INLINE Real<float>::V widen(const float *p) { return Real<float>::load(p); }
INLINE Real<double>::V widen(const double *p) { return Real<double>::load(p); }
INLINE Real<float>::V widen(const bfloat16 *p) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return (Real<float>::V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(HEEDFUL_TIER_NEON)
    return (Real<float>::V)vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p)), 16);
#else
    typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Full __attribute__((vector_size(VECTOR_BYTES)));
    Half half;
    __builtin_memcpy(&half, p, sizeof half);
    return (Real<float>::V)(__builtin_convertvector(half, Full) << 16);
#endif
}
INLINE Real<float>::V widen(const float16 *p) {
#if defined(__AVX512F__)
    return (Real<float>::V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__F16C__)
    return (Real<float>::V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(HEEDFUL_TIER_NEON)
    return (Real<float>::V)vcvt_f32_f16((float16x4_t)vld1_u16(reinterpret_cast<const uint16_t *>(p)));
#else
    Real<float>::V v;
    for (int lane = 0; lane < Real<float>::LANES; ++lane) v[lane] = to_float(p[lane]);
    return v;
#endif
}

INLINE float widen1(float x) { return x; }
INLINE double widen1(double x) { return x; }
INLINE float widen1(bfloat16 x) { return to_float(x); }
INLINE float widen1(float16 x) { return to_float(x); }

INLINE void narrow1(float *p, float x) { *p = x; }
INLINE void narrow1(double *p, double x) { *p = x; }
INLINE void narrow1(bfloat16 *p, float x) { *p = to_bfloat16(x); }
INLINE void narrow1(float16 *p, float x) { *p = to_float16(x); }

INLINE void narrow(float *p, Real<float>::V v) { Real<float>::store(p, v); }
INLINE void narrow(double *p, Real<double>::V v) { Real<double>::store(p, v); }
// By integers: the processor's own conversion flushes subnormal results.
INLINE void narrow(bfloat16 *p, Real<float>::V v) {
    [[maybe_unused]] typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Full __attribute__((vector_size(VECTOR_BYTES)));
    const Full bits = (Full)v;
    const Full rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    const Full chosen = v == v ? rounded : quiet;
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16((__m512i)chosen));
#else
    const Half half = __builtin_convertvector(chosen, Half);
    __builtin_memcpy(p, &half, sizeof half);
#endif
}
INLINE void narrow(float16 *p, Real<float>::V v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(HEEDFUL_TIER_NEON)
    vst1_u16(reinterpret_cast<uint16_t *>(p), (uint16x4_t)vcvt_f16_f32((float32x4_t)v));
#else
    for (int lane = 0; lane < Real<float>::LANES; ++lane) p[lane] = to_float16(v[lane]);
#endif
}
