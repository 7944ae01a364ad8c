// The two products of attention with keys and values read where they lie, for so few rows that packing would cost
// more than it saves: a decoding step is as fast as its memory. Included by each tier's source, inside its anonymous
// namespace, after features.h.

template <class A> struct Direct {
    typedef typename A::Input Input;
    typedef typename A::Number T;
    typedef typename A::Word Word;
    typedef typename A::Weight Weight;
    typedef Real<T> R;
    typedef typename R::V V;
    typedef Words<Word> W;
    typedef Tiles<A> Tile;
    static constexpr int LANES = R::LANES, UNIT = Tile::UNIT;
    static constexpr int SCORE_STRIDE = Tile::SCORE_STRIDE, WEIGHT_STRIDE = Tile::WEIGHT_STRIDE;
    static constexpr int STEP = LANES * A::PER_WORD; // numbers of a row in one vector
    static constexpr int MAX_ROWS = LANES < 4 ? LANES : 4;
    // Vectors of columns whose sums a tile keeps: 16 registers for 4 rows, or 8 where there are only 16.
    static constexpr int COLUMNS = BLOCKING.registers == 32 ? 4 : 2;

    static INLINE int64_t query_stride(int64_t head_dim) {
        return round_up((head_dim + A::PER_WORD - 1) / A::PER_WORD, LANES);
    }

    // The first `count` numbers of a vector, zero for the rest.
    static INLINE typename W::V part_of_words(const Input *p, int64_t count) {
        alignas(64) Input line[STEP] = {};
#if defined(__AVX512F__)
        // A copy of a length that the compiler does not know is a call.
        const uint64_t mask = (uint64_t(1) << count) - 1;
        if constexpr (sizeof(Input) == 8) _mm512_store_pd(line, _mm512_maskz_loadu_pd(__mmask8(mask), p));
        else if constexpr (sizeof(Input) == 4) _mm512_store_ps(line, _mm512_maskz_loadu_ps(__mmask16(mask), p));
        else if constexpr (STEP == 32) _mm512_store_si512(line, _mm512_maskz_loadu_epi16(__mmask32(mask), p));
        else _mm256_store_si256((__m256i *)line, _mm256_maskz_loadu_epi16(__mmask16(mask), p));
#else
        for (int64_t d = 0; d < count; ++d) line[d] = p[d];
#endif
        return A::words(line);
    }

    // The sums of neighbours in a and b: of blocks of S lanes within 16 bytes, or of whole 16 bytes, those of a first.
    template <int S, int... I> static INLINE V fold(V a, V b, Lanes<I...>) {
        constexpr int QUAD = 16 / int(sizeof(T)), QUADS = LANES / QUAD;
        if constexpr (S < QUAD)
            return __builtin_shufflevector(a, b,
                                           (I / S % 2 * LANES + I / QUAD * QUAD + I % QUAD / S / 2 * S + I % S)...) +
                   __builtin_shufflevector(
                       a, b, (I / S % 2 * LANES + I / QUAD * QUAD + I % QUAD / S / 2 * S + I % S + QUAD / 2)...);
        else
            return __builtin_shufflevector(
                       a, b, (I / (LANES / 2) * LANES + I / QUAD % (QUADS / 2) * 2 * QUAD + I % QUAD)...) +
                   __builtin_shufflevector(
                       a, b, (I / (LANES / 2) * LANES + I / QUAD % (QUADS / 2) * 2 * QUAD + I % QUAD + QUAD)...);
    }

    // Sums of LANES vectors, vector i in lane i. The shuffles are those that need neither an index nor a copy of what
    // they read: with any others this was a fifth of a decoding step's instructions.
    template <int COUNT = LANES, int S = 1> static INLINE V add_across(V *v) {
#pragma GCC unroll 16
        for (int i = 0; i < COUNT / 2; ++i) v[i] = fold<S>(v[2 * i], v[2 * i + 1], typename MakeLanes<LANES>::type());
        if constexpr (COUNT > 2) return add_across<COUNT / 2, 2 * S>(v);
        else return v[0];
    }

    // Rows to ask for ahead of their use: those at `row`, `offset` numbers on; null for none. A few rows at a time
    // between products: asked for all at once they overrun the queue of the L2 cache, and a step that read 22 GB/s read
    // 11. Into the L1 cache: into the L2 alone it read 23 for 29, and with the non-temporal hint the same from memory,
    // but less from a cache.
    struct Ahead {
        const Input *const *row;
        int64_t offset;

        INLINE Ahead operator+(int64_t rows) const { return {row ? row + rows : nullptr, offset}; }
        INLINE void ask(int64_t index, int64_t column, int64_t width) const {
            constexpr int64_t LINE = 64 / int64_t(sizeof(Input));
            const Input *at = row[index] + offset + column, *end = at + width;
            for (; at + 4 * LINE <= end; at += 4 * LINE) {
                __builtin_prefetch(at, 0, 3);
                __builtin_prefetch(at + LINE, 0, 3);
                __builtin_prefetch(at + 2 * LINE, 0, 3);
                __builtin_prefetch(at + 3 * LINE, 0, 3);
            }
            for (; at < end; at += LINE) __builtin_prefetch(at, 0, 3);
        }
    };

    // Scores of M rows of the query against `keys` keys, LANES / M at a time.
    template <int M>
    static NOINLINE void score_keys(const Word *query, int64_t stride, const Input *const *key, Ahead ahead, int keys,
                                    int64_t head_dim, T *score) {
        constexpr int KEYS = LANES / M;
        for (int first = 0; first < keys; first += KEYS, key += KEYS, score += KEYS) {
            if (ahead.row)
                for (int k = first; k < first + KEYS; ++k) ahead.ask(k, 0, head_dim);
            V sum[LANES] = {};
            const Word *words = query;
            int64_t d = 0;
            for (; d + STEP <= head_dim; d += STEP, words += LANES) {
                typename W::V line[M];
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) line[m] = W::load(words + m * stride);
#pragma GCC unroll 16
                for (int k = 0; k < KEYS; ++k) {
                    const typename W::V operand = A::words(key[k] + d);
#pragma GCC unroll 4
                    for (int m = 0; m < M; ++m) sum[m * KEYS + k] = A::dot(sum[m * KEYS + k], line[m], operand);
                }
            }
            if (d < head_dim) {
#pragma GCC unroll 16
                for (int k = 0; k < KEYS; ++k) {
                    const typename W::V operand = part_of_words(key[k] + d, head_dim - d);
#pragma GCC unroll 4
                    for (int m = 0; m < M; ++m)
                        sum[m * KEYS + k] = A::dot(sum[m * KEYS + k], W::load(words + m * stride), operand);
                }
            }
            const V total = add_across(sum);
            for (int m = 0; m < M; ++m)
                __builtin_memcpy(score + m * SCORE_STRIDE, (const T *)&total + m * KEYS, KEYS * sizeof(T));
        }
    }

    // Scores of all rows against the first `keys` of one unit.
    static INLINE void scores(const Word *query, int64_t stride, int rows, const Input *const *key, Ahead ahead,
                              int keys, int64_t head_dim, T *score) {
        for_rows(rows, [&](int first, auto count) {
            score_keys<decltype(count)::value>(query + first * stride, stride, key, first == 0 ? ahead : Ahead{}, keys,
                                               head_dim, score + first * SCORE_STRIDE);
        });
    }

    // Rows four at a time while they last. Rows past the end are zero queries, and their scores are not read.
    template <class Body> static INLINE void for_rows(int rows, Body body) {
        int first = 0;
        if constexpr (MAX_ROWS == 4)
            for (; first + 2 < rows; first += 4) body(first, typename Tile::template Count<4>());
        for (; first + 1 < rows; first += 2) body(first, typename Tile::template Count<2>());
        if (first < rows) body(first, typename Tile::template Count<1>());
    }

    // One vector of columns of a key, or two of a pair of keys whose numbers alternate.
    template <int N> static INLINE void load_columns(const Input *const *value, int64_t left, typename W::V *line) {
        if constexpr (A::PER_WORD == 1) {
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n)
                line[n] = left >= N * LANES ? A::words(value[0] + n * LANES)
                          : left > n * LANES
                              ? part_of_words(value[0] + n * LANES,
                                              left - n * LANES < LANES ? left - n * LANES : int64_t(LANES))
                              : typename W::V{};
        } else {
#pragma GCC unroll 4
            for (int n = 0; n < N; n += 2) {
                const int64_t here = left - n * LANES;
                const auto of = [&](const Input *row) {
                    return left >= N * LANES ? A::words(row + n * LANES)
                           : here > 0        ? part_of_words(row + n * LANES, here < STEP ? here : int64_t(STEP))
                                             : typename W::V{};
                };
                A::interleave(of(value[0]), of(value[1]), line[n], line[n + 1]);
            }
        }
    }

    // out[m][0..N vectors) = out * decay[m] + weight[m] . value over `keys` keys; `left` columns are there. The same
    // columns ahead are asked for.
    template <int M, int N, bool WHOLE>
    static NOINLINE void value_columns(const Weight *weight, const Input *const *value, Ahead ahead, int64_t column,
                                       int64_t left, int keys, T *out, int64_t out_stride, const T *decay) {
        V sum[M][N];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[m][n] = R::load(out + m * out_stride + n * LANES) * decay[m];
        for (int k = 0; k < keys; k += A::PER_WORD, value += A::PER_WORD, weight += A::PER_WORD) {
            if (ahead.row)
                for (int t = 0; t < A::PER_WORD; ++t) ahead.ask(k + t, column, WHOLE ? N * LANES : left);
            const Input *row[2] = {value[0] + column, value[A::PER_WORD - 1] + column};
            typename W::V line[N];
            load_columns<N>(row, WHOLE ? int64_t(N * LANES) : left, line);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                Word scalar;
                __builtin_memcpy(&scalar, weight + m * WEIGHT_STRIDE, sizeof scalar);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) sum[m][n] = A::madd(sum[m][n], scalar, line[n]);
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) R::store(out + m * out_stride + n * LANES, sum[m][n]);
    }

    // Adds the product of the rows' weights with the values of `keys` keys to out, whose rows are padded to a
    // multiple of 2 * LANES.
    static void values(const Weight *weight, int rows, const Input *const *value, Ahead ahead, int keys,
                       int64_t value_dim, T *out, int64_t out_stride, const T *decay) {
        for_rows(rows, [&](int first, auto count) {
            constexpr int M = decltype(count)::value;
            const Weight *from = weight + first * WEIGHT_STRIDE;
            T *to = out + first * out_stride;
            const Ahead here = first == 0 ? ahead : Ahead{};
            int64_t column = 0;
            for (; column + COLUMNS * LANES <= value_dim; column += COLUMNS * LANES)
                value_columns<M, COLUMNS, true>(from, value, here, column, 0, keys, to + column, out_stride,
                                                decay + first);
            for (; column + 2 * LANES <= value_dim; column += 2 * LANES)
                value_columns<M, 2, true>(from, value, here, column, 0, keys, to + column, out_stride, decay + first);
            if (column < value_dim)
                value_columns<M, 2, false>(from, value, here, column, value_dim - column, keys, to + column, out_stride,
                                           decay + first);
        });
    }
};
