// What a kernel computes with: single numbers, or pairs of bfloat16. Included by each tier's source, inside
// its anonymous namespace, after simd.h.

#if VECTOR_BYTES == 64
constexpr int PANEL = 12; // 24 accumulators, 2 operands and a broadcast: 27 of 32 registers
#else
constexpr int PANEL = 6; // 12 accumulators of 16 registers
#endif
static_assert(MAX_TILE_ROWS % PANEL == 0, "");

INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// The arithmetic of a kernel. A word is what one lane of an operand holds: a number, or a pair of bfloat16
// that the processor multiplies and adds at once.
template <class T, class In> struct Single {
    typedef In Input;
    typedef T Number;
    typedef T Word;
    typedef T Weight;
    static constexpr int PER_WORD = 1, EXP_DEGREE = 5;

    static INLINE typename Real<T>::V madd(typename Real<T>::V sum, Word scalar, typename Words<Word>::V v) {
        return scalar * v + sum;
    }
    static INLINE typename Words<Word>::V words(const In *p) { return widen(p); }
    static INLINE Word word(In first, In) { return widen1(first); }
    static INLINE Word zero() { return 0; }
    static INLINE Word negate(Word w) { return -w; }
    static INLINE void store_weights(Weight *p, typename Real<T>::V a, typename Real<T>::V b) {
        Real<T>::store(p, a);
        Real<T>::store(p + Real<T>::LANES, b);
    }
};

#if defined(__AVX512BF16__)
struct Paired {
    typedef bfloat16 Input;
    typedef float Number;
    typedef uint32_t Word;
    typedef bfloat16 Weight;
    static constexpr int PER_WORD = 2, EXP_DEGREE = 4;

    static INLINE Real<float>::V madd(Real<float>::V sum, Word scalar, Words<Word>::V v) {
        return (Real<float>::V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(scalar)), (__m512bh)v);
    }
    static INLINE Words<Word>::V words(const bfloat16 *p) { return (Words<Word>::V)_mm512_loadu_si512(p); }
    static INLINE Word word(bfloat16 first, bfloat16 second) { return first.bits | uint32_t(second.bits) << 16; }
    static INLINE Word zero() { return 0; }
    static INLINE Word negate(Word w) { return w ^ 0x80008000u; }
    static INLINE void store_weights(bfloat16 *p, Real<float>::V a, Real<float>::V b) {
        _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    }
};
#endif
