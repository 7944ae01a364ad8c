// Ceilings of the machine as this tier can use it. Included by each tier's source after forward.h.

#if defined(__aarch64__)
#define VECTOR_REGISTER "w"
#elif defined(__AVX512F__)
#define VECTOR_REGISTER "v"
#else
#define VECTOR_REGISTER "x"
#endif

template <class A> double burn(int64_t rounds) {
    typedef Real<typename A::Number> R;
    constexpr int SUMS = PANEL * 2;
    typename R::V sum[SUMS];
    for (int i = 0; i < SUMS; ++i) sum[i] = R::set1(i); // equal sums would be computed once
    typename Words<typename A::Word>::V operand = {};
    const typename A::Word scalar = A::zero();
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
        for (int i = 0; i < SUMS; ++i) {
            sum[i] = A::madd(sum[i], scalar, operand);
            // The compiler must not see that the operands never change: where multiplying and adding are two
            // instructions it would multiply once.
            asm volatile("" : "+" VECTOR_REGISTER(operand));
        }
    }
    typename R::V all = {};
    for (int i = 0; i < SUMS; ++i) all += sum[i];
    asm volatile("" : : VECTOR_REGISTER(all));
    return 2.0 * double(rounds) * SUMS * R::LANES * A::PER_WORD;
}

static double read_all(const char *data, size_t bytes) {
    typedef Words<int64_t> W;
    W::V sum[8] = {};
    constexpr size_t STEP = 8 * VECTOR_BYTES;
    for (size_t at = 0; at + STEP <= bytes; at += STEP) {
        __builtin_prefetch(data + at + 4096);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sum[i] += W::load(reinterpret_cast<const int64_t *>(data + at + i * VECTOR_BYTES));
    }
    for (int i = 1; i < 8; ++i) sum[0] += sum[i];
    return double(sum[0][0]);
}
