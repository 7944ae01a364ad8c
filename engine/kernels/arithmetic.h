// What a kernel computes with: single numbers, or pairs of bfloat16. Included by each tier's source, inside
// its anonymous namespace, after simd.h.

constexpr int PANEL = BLOCKING.panel_rows;
static_assert(BLOCKING.vector_bytes == VECTOR_BYTES, "");

INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// heedful_dtype of a type.
template <class In> struct Code;
template <> struct Code<float> {
    static constexpr int value = 0;
};
template <> struct Code<bfloat16> {
    static constexpr int value = 1;
};
template <> struct Code<float16> {
    static constexpr int value = 2;
};
template <> struct Code<double> {
    static constexpr int value = 3;
};

// The arithmetic of a kernel. A word is what one lane of an operand holds: a number, or a pair of bfloat16
// that the processor multiplies and adds at once.
template <class T, class In> struct Single {
    typedef In Input;
    typedef T Number;
    typedef T Word;
    typedef T Weight;
    static constexpr int PER_WORD = 1, EXP_DEGREE = 5, DTYPE = Code<In>::value;

    static INLINE typename Real<T>::V madd(typename Real<T>::V sum, Word scalar, typename Words<Word>::V v) {
        return scalar * v + sum;
    }
    static INLINE typename Real<T>::V dot(typename Real<T>::V sum, typename Words<Word>::V a,
                                          typename Words<Word>::V b) {
        return a * b + sum;
    }
    static INLINE typename Words<Word>::V words(const In *p) { return widen(p); }
    static INLINE Word word(In first, In) { return widen1(first); }
    static INLINE Word zero() { return 0; }
    static INLINE Word negate(Word w) { return -w; }
    static INLINE void store_weights(Weight *p, typename Real<T>::V a, typename Real<T>::V b) {
        Real<T>::store(p, a);
        Real<T>::store(p + Real<T>::LANES, b);
    }
    // Zeroes the weights of a unit whose bit is clear.
    static INLINE void drop(Weight *p, uint64_t bits) {
        constexpr int LANES = Real<T>::LANES;
        Real<T>::store(p, Real<T>::keep_or_zero(Real<T>::load(p), uint32_t(bits & ((uint64_t(1) << LANES) - 1))));
        Real<T>::store(p + LANES, Real<T>::keep_or_zero(Real<T>::load(p + LANES),
                                                        uint32_t(bits >> LANES & ((uint64_t(1) << LANES) - 1))));
    }
};

#if defined(__AVX512BF16__)
struct Paired {
    typedef bfloat16 Input;
    typedef float Number;
    typedef uint32_t Word;
    typedef bfloat16 Weight;
    static constexpr int PER_WORD = 2, EXP_DEGREE = 4, DTYPE = Code<bfloat16>::value;

    static INLINE Real<float>::V madd(Real<float>::V sum, Word scalar, Words<Word>::V v) {
        return (Real<float>::V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(scalar)), (__m512bh)v);
    }
    static INLINE Real<float>::V dot(Real<float>::V sum, Words<Word>::V a, Words<Word>::V b) {
        return (Real<float>::V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    // Words of the numbers of two rows in turn: columns 0 to 15, and 16 to 31.
    static INLINE void interleave(Words<Word>::V first, Words<Word>::V second, Words<Word>::V &low,
                                  Words<Word>::V &high) {
        typedef uint16_t Halves __attribute__((vector_size(64)));
        Halves from_low, from_high;
        for (int i = 0; i < 32; ++i) {
            from_low[i] = uint16_t(i / 2 + i % 2 * 32);
            from_high[i] = uint16_t(from_low[i] + 16);
        }
        low = (Words<Word>::V)_mm512_permutex2var_epi16((__m512i)first, (__m512i)from_low, (__m512i)second);
        high = (Words<Word>::V)_mm512_permutex2var_epi16((__m512i)first, (__m512i)from_high, (__m512i)second);
    }
    static INLINE Words<Word>::V words(const bfloat16 *p) { return (Words<Word>::V)_mm512_loadu_si512(p); }
    static INLINE Word word(bfloat16 first, bfloat16 second) { return first.bits | uint32_t(second.bits) << 16; }
    static INLINE Word zero() { return 0; }
    static INLINE Word negate(Word w) { return w ^ 0x80008000u; }
    static INLINE void store_weights(bfloat16 *p, Real<float>::V a, Real<float>::V b) {
        _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    }
    // Words of the numbers of two rows.
    static INLINE Words<Word>::V pair(Real<float>::V first, Real<float>::V second) {
        typedef uint16_t Halves __attribute__((vector_size(64)));
        Halves alternate;
        for (int i = 0; i < 32; ++i) alternate[i] = uint16_t(i / 2 + i % 2 * 16);
        return (Words<Word>::V)_mm512_permutexvar_epi16((__m512i)alternate,
                                                        (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
    }
    static INLINE void drop(bfloat16 *p, uint64_t bits) {
        _mm512_storeu_si512(p, _mm512_maskz_loadu_epi16(__mmask32(bits), p));
    }
};
#endif
