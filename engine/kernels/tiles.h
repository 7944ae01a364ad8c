// The two products of attention over one panel of rows, their operands packed, all accumulators in registers.
// Included by each tier's source, inside its anonymous namespace, after arithmetic.h.
//
// Each reaches 95 % of the multiply-add rate or more, with strides known at run time: with the head dim a
// constant GCC folded every load into its uses, and the load ports were the limit.

template <class A> struct Tiles {
    typedef typename A::Input Input;
    typedef typename A::Number T;
    typedef typename A::Word Word;
    typedef typename A::Weight Weight;
    typedef Real<T> R;
    typedef typename R::V V;
    typedef Words<Word> W;
    static constexpr int LANES = R::LANES, UNIT = 2 * LANES;
    static constexpr int UNITS = KEY_BLOCK / UNIT; // of a key block
    // One vector of padding keeps the rows of a panel in different sets of the L1 cache.
    static constexpr int SCORE_STRIDE = KEY_BLOCK + LANES;
    // Weights of one number a word take the place of their scores.
    static constexpr int WEIGHT_STRIDE = A::PER_WORD == 1 ? SCORE_STRIDE : KEY_BLOCK + 2 * LANES;

    // score[m][0..UNIT) = query[.][m] . key[.][0..UNIT), over `steps` words.
    template <int M> static NOINLINE void score_tile(const Word *query, const Word *key, int64_t steps, T *score) {
        V sum[M][2] = {};
        for (int64_t step = 0; step < steps; ++step, query += PANEL, key += UNIT) {
            const typename W::V low = W::load(key), high = W::load(key + LANES);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                sum[m][0] = A::madd(sum[m][0], query[m], low);
                sum[m][1] = A::madd(sum[m][1], query[m], high);
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            R::store(score + m * SCORE_STRIDE, sum[m][0]);
            R::store(score + m * SCORE_STRIDE + LANES, sum[m][1]);
        }
    }

    // out[m][0..N vectors) = out * decay[m] + weight[m] . value, over the keys of `units` units whose
    // values begin at value[u], value_stride words from one word of keys to the next.
    template <int M, int N>
    static NOINLINE void value_tile(const Weight *weight, const Word *const *value, int64_t column,
                                    int64_t value_stride, int units, T *out, int64_t out_stride, const T *decay) {
        V sum[M][N];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) sum[m][n] = R::load(out + m * out_stride + n * LANES) * decay[m];
        for (int u = 0; u < units; ++u) {
            const Word *line = value[u] + column;
            // Laid out one after the other, the few steps of a short unit kept sums on the stack.
#pragma GCC unroll 1
            for (int step = 0; step < UNIT / A::PER_WORD; ++step, line += value_stride, weight += A::PER_WORD) {
                typename W::V operand[N];
#pragma GCC unroll 2
                for (int n = 0; n < N; ++n) operand[n] = W::load(line + n * LANES);
#pragma GCC unroll 16
                for (int m = 0; m < M; ++m) {
                    Word scalar;
                    __builtin_memcpy(&scalar, weight + m * WEIGHT_STRIDE, sizeof scalar);
#pragma GCC unroll 2
                    for (int n = 0; n < N; ++n) sum[m][n] = A::madd(sum[m][n], scalar, operand[n]);
                }
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) R::store(out + m * out_stride + n * LANES, sum[m][n]);
    }

    // out[m][0..N vectors) += sum over `steps` of weight[step][m] * value[step][.]: the weights of one row lie side by
    // side, and the rows are what is summed over.
    template <int M, int N>
    static NOINLINE void outer_tile(const Word *weight, int64_t weight_stride, const Word *value, int64_t value_stride,
                                    int64_t steps, T *out, int64_t out_stride) {
        V sum[M][N];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) sum[m][n] = R::load(out + m * out_stride + n * LANES);
        for (int64_t step = 0; step < steps; ++step, weight += weight_stride, value += value_stride) {
            typename W::V operand[N];
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) operand[n] = W::load(value + n * LANES);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
                for (int n = 0; n < N; ++n) sum[m][n] = A::madd(sum[m][n], weight[m], operand[n]);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) R::store(out + m * out_stride + n * LANES, sum[m][n]);
    }

    // Those of a tile's units in which a row of one panel has a pair that counts, by their place in the tile's list:
    // where a pattern is finer than a tile, its panels see different keys.
    struct Listed {
        int count;
        uint8_t at[UNITS];
    };
    static INLINE void list_units(const Expansion &seen, int first, int rows, Listed &listed) {
        listed.count = 0;
        for (int u = 0; u < seen.unit_count; ++u) {
            uint64_t any = ~uint64_t(0);
            if (seen.partial[u]) {
                const int key = seen.index[u] * UNIT;
                any = 0;
                for (int r = first; r < first + rows; ++r) any |= seen.row[r][key / 64];
                any = any >> (key % 64) & ((uint64_t(1) << (UNIT - 1) << 1) - 1);
            }
            listed.at[listed.count] = uint8_t(u);
            listed.count += any != 0;
        }
    }

    template <int N> struct Count {
        static constexpr int value = N;
    };

    // Calls body with the height of each panel of the tile, the smallest that covers what is left.
    template <class Body> static INLINE void for_panels(int rows, Body body) {
        for (int first = 0; first < rows; first += PANEL) {
            const int left = rows - first;
            if constexpr (PANEL == 12) {
                if (left > 8) {
                    body(first, Count<12>());
                    continue;
                }
                if (left > 4) {
                    body(first, Count<8>());
                    continue;
                }
            } else if (left > 4) {
                body(first, Count<6>());
                continue;
            }
            if (left > 2) body(first, Count<4>());
            else if (left > 1) body(first, Count<2>());
            else body(first, Count<1>());
        }
    }
};
