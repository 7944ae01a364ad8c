// Attention backward against one block of keys, for one tier. Included by each tier's source, inside its anonymous
// namespace, after forward.h.
//
// The weights are recomputed from the log-sum-exp, as in FlashAttention-2 (Dao, 2023): with P the weights after
// dropout, dP = grad_out value^T, delta the row sums of grad_out * out, and dS = P_before * (dP - delta),
//     grad_value = P^T grad_out,   grad_query = scale dS key,   grad_key = scale dS^T query.
// Rows are taken in steps of a few tiles, the last first: the block before, which must add to the running gradient of
// a row's query first, then is ahead of this one also where attention is causal.

template <class A> struct DirectBackward;

template <class A> struct Backward {
    typedef typename A::Input Input;
    typedef typename A::Number T;
    typedef typename A::Word Word;
    typedef typename A::Weight Weight;
    typedef Real<T> R;
    typedef typename R::V V;
    typedef Words<Word> W;
    typedef Tiles<A> Tile;
    typedef Pack<A> Packing;
    static constexpr int LANES = Tile::LANES, UNIT = Tile::UNIT, UNITS = Tile::UNITS;
    static constexpr int SCORE_STRIDE = Tile::SCORE_STRIDE, WEIGHT_STRIDE = Tile::WEIGHT_STRIDE;
    static constexpr int MAX_TILES = 8; // of a step
    static constexpr bool PAIRED = A::PER_WORD == 2;

    struct Scratch {
        int64_t steps, value_steps, key_stride, value_stride;
        Word *key, *value;            // units of [steps][UNIT]
        Word *key_rows, *cleaned;     // units of [UNIT / PER_WORD][key_stride]
        T *grad_key, *grad_value;     // [keys][key_stride], [keys][value_stride]
        Word *query, *grad;           // panels of a step's rows: queries, gradients of the output
        Word *query_rows, *grad_rows; // the same in rows of words: [rows / PER_WORD][stride]
        Word *weight, *slope;         // P after dropout and dS, [rows / PER_WORD][SCORE_STRIDE]
        Weight *slope_rows;           // dS by row, [rows][WEIGHT_STRIDE]
        T *score, *grad_weight;       // of a panel, [PANEL][SCORE_STRIDE]
        T *steepness;                 // [PANEL][UNIT]
        T *slope_sum;                 // by row of a step
        char *end;

        Scratch(const BackwardCall &call, char *memory) {
            steps = (call.head_dim + A::PER_WORD - 1) / A::PER_WORD;
            value_steps = (call.value_dim + A::PER_WORD - 1) / A::PER_WORD;
            key_stride = round_up(call.head_dim, LANES);
            value_stride = round_up(call.value_dim, LANES);
            const bool direct = DirectBackward<A>::serves(call);
            const int64_t keys = direct ? 0 : call.block_keys;
            const int64_t rows = direct ? round_up(call.rows(), PANEL) : call.step_rows;
            end = memory;
            key = take<Word>(keys * steps);
            value = take<Word>(keys * value_steps);
            key_rows = take<Word>(keys / A::PER_WORD * key_stride);
            cleaned = take<Word>(keys / A::PER_WORD * key_stride);
            grad_key = take<T>(keys * key_stride);
            grad_value = take<T>(keys * value_stride);
            query = take<Word>(rows * steps + LANES);
            grad = take<Word>(rows * value_steps + LANES);
            query_rows = take<Word>(rows / A::PER_WORD * key_stride);
            grad_rows = take<Word>(rows / A::PER_WORD * value_stride);
            weight = take<Word>(rows / A::PER_WORD * SCORE_STRIDE);
            slope = take<Word>(rows / A::PER_WORD * SCORE_STRIDE);
            slope_rows = PAIRED ? take<Weight>(rows * WEIGHT_STRIDE) : reinterpret_cast<Weight *>(slope);
            score = take<T>(PAIRED ? PANEL * SCORE_STRIDE : 0);
            grad_weight = take<T>(PAIRED ? PANEL * SCORE_STRIDE : 0);
            steepness = take<T>(PANEL * UNIT);
            slope_sum = take<T>(rows);
        }

        template <class U> U *take(int64_t count) {
            U *begin = reinterpret_cast<U *>(end);
            end += round_up(count * int64_t(sizeof(U)), 64);
            return begin;
        }
    };

    // Row `row` of a key head in a tensor of queries' shape.
    template <class U>
    static INLINE U *row_of(U *tensor, const int64_t *stride, const BackwardCall &call, int64_t batch_index,
                            int64_t kv_head, int64_t row) {
        return tensor + batch_index * stride[0] + (kv_head * call.group + row % call.group) * stride[1] +
               row / call.group * stride[2];
    }

    static T *row_lse(const BackwardCall &call, int64_t pair) {
        return static_cast<T *>(call.row_lse) + pair * call.padded_rows;
    }
    static T *row_delta(const BackwardCall &call, int64_t pair) {
        return static_cast<T *>(call.row_delta) + pair * call.padded_rows;
    }
    static T *sum_of(const BackwardCall &call, int64_t batch_index, int64_t kv_head) {
        return static_cast<T *>(call.sum) + batch_index * call.sum_stride[0] + kv_head * call.sum_stride[1];
    }

    static T dot_rows(const Input *a, int64_t a_stride, const Input *b, int64_t b_stride, int64_t count) {
        V sum = {};
        int64_t d = 0;
        if (a_stride == 1 && b_stride == 1)
            for (; d + LANES <= count; d += LANES) sum += widen(a + d) * widen(b + d);
        T total = R::reduce_add(sum);
        for (; d < count; ++d) total += widen1(a[d * a_stride]) * widen1(b[d * b_stride]);
        return total;
    }

    static bool all_zero(const Input *row, int64_t stride, int64_t count) {
        bool zero = true;
        for (int64_t d = 0; d < count; ++d) zero &= widen1(row[d * stride]) == 0;
        return zero;
    }

    // The statistics of rows, and their running gradients set to zero. A row that has no key gets the log-sum-exp
    // +inf, from which every weight comes out as 0.
    static void prepare(const BackwardCall &call, int64_t batch_index, int64_t kv_head, int64_t first_row,
                        int64_t rows) {
        const int64_t pair = batch_index * call.kv_heads + kv_head;
        T *lse = row_lse(call, pair), *delta = row_delta(call, pair);
        T *sums = sum_of(call, batch_index, kv_head);
        for (int64_t row = first_row; row < first_row + rows; ++row) {
            if (row >= call.rows()) {
                lse[row] = T(__builtin_inff());
                delta[row] = 0;
                continue;
            }
            __builtin_memset(sums + row * call.sum_stride[2], 0, sum_width(call) * sizeof(T));
            const int64_t head = kv_head * call.group + row % call.group;
            const int64_t at = call.statistic(batch_index, head, row / call.group);
            const T own = static_cast<const T *>(call.lse)[at];
            const bool empty = own == -T(__builtin_inff());
            T sum = 0;
            if (!empty) {
                const Input *out =
                    row_of(reinterpret_cast<const Input *>(call.out), call.out_stride, call, batch_index, kv_head, row);
                sum = dot_rows(row_of(reinterpret_cast<const Input *>(call.grad_out), call.grad_out_stride, call,
                                      batch_index, kv_head, row),
                               call.grad_out_stride[3], out, call.out_stride[3], call.value_dim);
                // The row of a sink alone, whose gradient nobody reads.
                if (sum != sum && all_zero(out, call.out_stride[3], call.value_dim)) sum = 0;
                if (call.grad_lse) sum -= static_cast<const T *>(call.grad_lse)[at];
            }
            static_cast<T *>(call.delta)[at] = sum;
            delta[row] = sum;
            // Nor has a row under an enormous bias weights that its log-sum-exp could give back.
            const bool lost = own < Rules<A>::LOWEST_BIAS / 2;
            lse[row] = empty || lost ? T(__builtin_inff()) : own * T(LOG2_E);
        }
    }

    static void finish(const BackwardCall &call, int64_t batch_index, int64_t kv_head, int64_t first_row,
                       int64_t rows) {
        const T *sum = sum_of(call, batch_index, kv_head);
        for (int64_t row = first_row; row < first_row + rows && row < call.rows(); ++row)
            store_row(sum + row * call.sum_stride[2], T(call.scale), call.head_dim,
                      row_of(reinterpret_cast<Input *>(call.grad_query), call.grad_query_stride, call, batch_index,
                             kv_head, row),
                      call.grad_query_stride[3]);
    }

    static void store_row(const T *source, T factor, int64_t count, Input *target, int64_t stride) {
        int64_t d = 0;
        if (stride == 1)
            for (; d + LANES <= count; d += LANES) narrow(target + d, R::load(source + d) * R::set1(factor));
        for (; d < count; ++d) narrow1(target + d * stride, source[d] * factor);
    }

    // What the rows of a tile bring to the panels and to the sums over rows: zeros where a row sees no key of the
    // block, because a weight of zero does not silence a NaN.
    static NOINLINE void pack_tile(const BackwardCall &call, const BackwardItem &item, const Scratch &s,
                                   const Expansion &seen, int64_t first_row, int first, int rows) {
        const Input *query[MAX_TILE_ROWS] = {}, *grad[MAX_TILE_ROWS] = {};
        const T *lse = row_lse(call, item.batch_index * call.kv_heads + item.kv_head);
        bool all = false;
        for (int u = 0; u < seen.unit_count; ++u) all |= !seen.partial[u];
        for (int r = 0; r < rows; ++r) {
            const int64_t row = first_row + r;
            uint64_t any = all;
            for (int word = 0; word < BLOCK_WORDS && !all; ++word) any |= seen.row[r][word];
            if (any && lse[row] != T(__builtin_inff())) {
                query[r] = row_of(reinterpret_cast<const Input *>(call.query), call.query_stride, call,
                                  item.batch_index, item.kv_head, row);
                grad[r] = row_of(reinterpret_cast<const Input *>(call.grad_out), call.grad_out_stride, call,
                                 item.batch_index, item.kv_head, row);
            }
        }
        Packing::panels(query, rows, call.query_stride[3], call.head_dim, s.steps, s.query + first * s.steps, false);
        Packing::panels(grad, rows, call.grad_out_stride[3], call.value_dim, s.value_steps,
                        s.grad + first * s.value_steps, false);
        Packing::copy_rows(query, rows, call.query_stride[3], call.head_dim,
                           s.query_rows + first / A::PER_WORD * s.key_stride, s.key_stride);
        Packing::copy_rows(grad, rows, call.grad_out_stride[3], call.value_dim,
                           s.grad_rows + first / A::PER_WORD * s.value_stride, s.value_stride);
    }

    // One tile of rows while its weights are made.
    struct View {
        const Rules<A> &rules;
        const Expansion &seen;
        const uint64_t (*kept)[BLOCK_WORDS]; // null without dropout
        const T *lse, *delta;                // of the tile's rows
        T factor, grow;                      // grow: 1 / (1 - dropout_p)
        int64_t block;
        int rows;
    };

    // The weight and the slope of the loss at one vector of scores of a row. grad_weight is dP.
    static INLINE void differentiate(const View &view, int r, bool partial, uint32_t bits, uint32_t kept, V score,
                                     V grad_weight, V &weight, V &slope) {
        weight = R::template exp2<A::EXP_DEGREE>(score * R::set1(view.factor) - R::set1(view.lse[r]));
        if (view.kept) grad_weight = R::keep_or_zero(grad_weight * R::set1(view.grow), kept);
        slope = weight * (grad_weight - R::set1(view.delta[r]));
        if (view.kept) weight = R::keep_or_zero(weight * R::set1(view.grow), kept);
        if (partial) {
            weight = R::keep_or_zero(weight, bits);
            slope = R::keep_or_zero(slope, bits);
        }
    }

    // What a row's slopes against one unit mean for bias, ALiBi slopes and, through the softcap, the scores.
    static NOINLINE void spread(const BackwardCall &call, const View &view, int r, int64_t key, const T *steepness,
                                T *slope_sum, V *slope) {
        const int64_t left = call.k_length - key;
        if (call.grad_bias) {
            T *target = static_cast<T *>(call.grad_bias) + view.rules.batch_index * call.grad_bias_stride[0] +
                        view.rules.head[r] * call.grad_bias_stride[1] + view.rules.query[r] * call.grad_bias_stride[2] +
                        key;
            for (int half = 0; half < 2; ++half, target += LANES) {
                if (left >= (half + 1) * LANES) R::store(target, R::load(target) + slope[half]);
                else
                    for (int lane = 0; half * LANES + lane < left; ++lane) target[lane] += slope[half][lane];
            }
        }
        if (call.grad_slopes) {
            V sum = {};
            for (int half = 0; half < 2; ++half) {
                V distance;
                for (int lane = 0; lane < LANES; ++lane)
                    distance[lane] =
                        T(call.k_origin + call.step * (key + half * LANES + lane)) - view.rules.position[r];
                // Of slopes beyond the pairs that count, which are 0, the distance may be anything.
                sum += slope[half] * (distance < V{} ? distance : -distance);
            }
            *slope_sum += R::reduce_add(sum);
        }
        if (view.rules.cap > 0) {
            for (int half = 0; half < 2; ++half) {
                // The steepness of a score that does not count may be NaN.
                const V through = slope[half] * R::load(steepness + half * LANES);
                slope[half] = slope[half] == V{} ? V{} : through;
            }
        }
    }

    // Weights and slopes of a panel against one unit, from the two products.
    template <int M>
    static INLINE void weigh(const BackwardCall &call, const BackwardItem &item, const Scratch &s, const View &view,
                             int first, int row_base, int u, T *score, T *grad_weight) {
        const Expansion &seen = view.seen;
        const int key = seen.index[u] * UNIT;
        const bool partial = seen.partial[u], spreads = call.grad_bias || call.grad_slopes || view.rules.cap > 0;
        if (view.rules.active) view.rules.template apply<M>(first, view.block + key, score, SCORE_STRIDE, s.steepness);
        if (call.grad_weights) add_grad_weights<M>(call, item, view, first, key, grad_weight);
        constexpr uint64_t HALF = (uint64_t(1) << LANES) - 1;
        constexpr int TOGETHER = A::PER_WORD;
        for (int m = 0; m < M; m += TOGETHER) {
            V weight[TOGETHER][2], slope[TOGETHER][2];
#pragma GCC unroll 2
            for (int t = 0; t < TOGETHER; ++t) {
                const int r = first + m + t;
                const uint64_t bits = partial ? seen.row[r][key / 64] >> (key % 64) : 0;
                const uint64_t kept = view.kept ? view.kept[r][key / 64] >> (key % 64) : 0;
                const T *from = score + (m + t) * SCORE_STRIDE, *grad = grad_weight + (m + t) * SCORE_STRIDE;
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half)
                    differentiate(view, r, partial, uint32_t(bits >> (half * LANES) & HALF),
                                  uint32_t(kept >> (half * LANES) & HALF), R::load(from + half * LANES),
                                  R::load(grad + half * LANES), weight[t][half], slope[t][half]);
                if (spreads && r < view.rows)
                    spread(call, view, r, view.block + key, s.steepness + (m + t) * UNIT, s.slope_sum + row_base + r,
                           slope[t]);
            }
            if constexpr (PAIRED) {
                const int64_t at = (row_base + first + m) / 2 * SCORE_STRIDE + key;
                for (int half = 0; half < 2; ++half) {
                    W::store(s.weight + at + half * LANES, A::pair(weight[0][half], weight[1][half]));
                    W::store(s.slope + at + half * LANES, A::pair(slope[0][half], slope[1][half]));
                }
                for (int t = 0; t < 2; ++t)
                    A::store_weights(s.slope_rows + (row_base + first + m + t) * WEIGHT_STRIDE + key, slope[t][0],
                                     slope[t][1]);
            } else {
                const int64_t at = (row_base + first + m) * SCORE_STRIDE + key;
                for (int half = 0; half < 2; ++half) {
                    R::store(s.weight + at + half * LANES, weight[0][half]);
                    R::store(s.slope + at + half * LANES, slope[0][half]);
                }
            }
        }
    }

    template <int M>
    static NOINLINE void add_grad_weights(const BackwardCall &call, const BackwardItem &item, const View &view,
                                          int first, int key, T *grad_weight) {
        alignas(64) T line[UNIT];
        const int64_t left = call.k_length - view.block - key;
        for (int m = 0; m < M && first + m < view.rows; ++m, grad_weight += SCORE_STRIDE) {
            const int64_t *stride = call.grad_weights_stride;
            load_line<T>(call.grad_weights +
                             int64_t(sizeof(Input)) *
                                 (item.batch_index * stride[0] + view.rules.head[first + m] * stride[1] +
                                  view.rules.query[first + m] * stride[2] + (view.block + key) * stride[3]),
                         A::DTYPE, stride[3], left < UNIT ? left : UNIT, UNIT, line);
            for (int half = 0; half < 2; ++half)
                R::store(grad_weight + half * LANES,
                         R::load(grad_weight + half * LANES) + R::load(line + half * LANES));
        }
    }

    // Weights and slopes of one tile against the units that it sees.
    static NOINLINE void weigh_tile(const BackwardCall &call, const BackwardItem &item, const Scratch &s,
                                    const View &view, int row_base) {
        // Units outside: one unit of keys and values stays in the L1 cache for all rows of the tile.
        for (int u = 0; u < view.seen.unit_count; ++u) {
            const int unit = view.seen.index[u];
            for_rows(view.rows, [&](int first, auto count) {
                constexpr int M = decltype(count)::value;
                if (!sees(view, first, first + M < view.rows ? M : view.rows - first, u)) {
                    zero_rows(s, row_base + first, M, unit);
                    return;
                }
                T *score, *grad_weight;
                if constexpr (PAIRED) {
                    score = s.score;
                    grad_weight = s.grad_weight;
                } else {
                    score = s.weight + (row_base + first) * SCORE_STRIDE + unit * UNIT;
                    grad_weight = s.slope + (row_base + first) * SCORE_STRIDE + unit * UNIT;
                }
                Tile::template score_tile<M>(s.query + (row_base + first) * s.steps, s.key + unit * UNIT * s.steps,
                                             s.steps, score);
                Tile::template score_tile<M>(s.grad + (row_base + first) * s.value_steps,
                                             s.value + unit * UNIT * s.value_steps, s.value_steps, grad_weight);
                weigh<M>(call, item, s, view, first, row_base, u, score, grad_weight);
            });
        }
    }

    // Panels of a tile, whose last holds an even number of rows where words pair them.
    template <class Body> static INLINE void for_rows(int rows, Body body) {
        Tile::for_panels(rows, [&](int first, auto count) {
            constexpr int M = decltype(count)::value;
            body(first, typename Tile::template Count<M == 1 && PAIRED ? 2 : M>());
        });
    }

    // sum[row] += dS key for some columns of the rows of one tile.
    static INLINE void add_to_queries(const BackwardCall &call, const Scratch &s, const Expansion &seen, int rows,
                                      int row_base, const Word *const *key_rows, int64_t column, T *sum) {
        alignas(64) T one[MAX_TILE_ROWS];
        for (T &x : one) x = 1;
        for_rows(rows, [&](int first, auto count) {
            constexpr int M = decltype(count)::value;
            typename Tile::Listed own;
            Tile::list_units(seen, first, first + M < rows ? M : rows - first, own);
            T *out = sum + first * call.sum_stride[2] + column;
            for (int n = 0; n < own.count;) {
                // Units side by side are one product.
                const int u = own.at[n], unit = seen.index[u];
                int units = 1;
                while (n + units < own.count && seen.index[own.at[n + units]] == unit + units) ++units;
                const Weight *weight = s.slope_rows + (row_base + first) * WEIGHT_STRIDE + unit * UNIT;
                if (column + UNIT <= s.key_stride)
                    Tile::template value_tile<M, 2>(weight, key_rows + u, column, s.key_stride, units, out,
                                                    call.sum_stride[2], one);
                else
                    Tile::template value_tile<M, 1>(weight, key_rows + u, column, s.key_stride, units, out,
                                                    call.sum_stride[2], one);
                n += units;
            }
        });
    }

    // The rows of keys that a tile multiplies, those that no row of it uses zeroed where they are not finite.
    static void find_key_rows(const Scratch &s, const Expansion &seen, const bool *finite, const Word **key_rows) {
        for (int u = 0; u < seen.unit_count; ++u) {
            const int unit = seen.index[u];
            Word *at = s.key_rows + unit * (UNIT / A::PER_WORD) * s.key_stride;
            key_rows[u] = at;
            if (seen.partial[u] && !finite[unit]) {
                Word *cleaned = s.cleaned + (at - s.key_rows);
                Packing::clean(at, seen.used, unit, s.key_stride, cleaned);
                key_rows[u] = cleaned;
            }
        }
    }

    // sum[key] += weight^T rows for the first `keys` keys of one unit over `steps` words of rows.
    static INLINE void add_to_keys(const Word *weight, const Word *rows, int64_t row_stride, int64_t steps, int keys,
                                   T *sum) {
        Tile::for_panels(keys, [&](int first, auto count) {
            constexpr int M = decltype(count)::value;
            T *out = sum + first * row_stride;
            int64_t column = 0;
            for (; column + UNIT <= row_stride; column += UNIT)
                Tile::template outer_tile<M, 2>(weight + first, SCORE_STRIDE, rows + column, row_stride, steps,
                                                out + column, row_stride);
            if (column < row_stride)
                Tile::template outer_tile<M, 1>(weight + first, SCORE_STRIDE, rows + column, row_stride, steps,
                                                out + column, row_stride);
        });
    }

    // Whether a row of a panel has a pair in a unit.
    static INLINE bool sees(const View &view, int first, int rows, int u) {
        if (!view.seen.partial[u]) return true;
        const int key = view.seen.index[u] * UNIT;
        uint64_t any = 0;
        for (int r = first; r < first + rows; ++r) any |= view.seen.row[r][key / 64];
        return any >> (key % 64) & Rules<A>::ALL;
    }

    // The weights and slopes that were not made, of units that others of the rows summed over see.
    static void zero_rows(const Scratch &s, int first, int rows, int unit) {
        for (int r = 0; r < rows; r += A::PER_WORD) {
            const int64_t at = (first + r) / A::PER_WORD * SCORE_STRIDE + unit * UNIT;
            __builtin_memset(s.weight + at, 0, UNIT * sizeof(Word));
            __builtin_memset(s.slope + at, 0, UNIT * sizeof(Word));
        }
    }

    // The rows of a tile that sees nothing: those before and behind it may be summed over in one go with it, and a
    // weight of zero does not silence what the memory held.
    static void zero_tile(const Scratch &s, int row_base) {
        const int64_t first = row_base / A::PER_WORD, rows = MAX_TILE_ROWS / A::PER_WORD;
        __builtin_memset(s.query_rows + first * s.key_stride, 0, rows * s.key_stride * sizeof(Word));
        __builtin_memset(s.grad_rows + first * s.value_stride, 0, rows * s.value_stride * sizeof(Word));
    }

    static void run(const BackwardCall &call, const BackwardItem &item, char *memory) {
        if (DirectBackward<A>::serves(call)) return DirectBackward<A>::run(call, item, memory);
        const Scratch s(call, memory);
        const int64_t total = call.rows(), pair = item.batch_index * call.kv_heads + item.kv_head;
        __builtin_memset(s.grad_key, 0, item.keys * s.key_stride * sizeof(T));
        __builtin_memset(s.grad_value, 0, item.keys * s.value_stride * sizeof(T));
        int64_t q_begin, q_end;
        {
            const AtomSelection all(*call.schedule, item.batch_index, 0, call.q_length);
            all.rows_hull(item.first_key, item.first_key + item.keys, q_begin, q_end);
        }
        if (q_begin < q_end) visit_rows(call, item, s, q_begin, q_end, total, pair);
        write_keys(call, item, s);
    }

    static void visit_rows(const BackwardCall &call, const BackwardItem &item, const Scratch &s, int64_t q_begin,
                           int64_t q_end, int64_t total, int64_t pair) {
        const typename Packing::Matrix keys(call.key, call.key_stride, call, item.batch_index, item.kv_head,
                                            call.head_dim);
        const typename Packing::Matrix values(call.value, call.value_stride, call, item.batch_index, item.kv_head,
                                              call.value_dim);
        const AtomSelection selection(*call.schedule, item.batch_index, q_begin, q_end);
        Rules<A> rules(call, item.batch_index);
        rules.magnitude = T(call.scale); // with its sign: no maximum is taken here
        const bool features = rules.active || rules.drops || call.grad_weights;
        bool packed[UNITS] = {}, finite[UNITS];
        Expansion seen[MAX_TILES];
        uint64_t kept[MAX_TILE_ROWS][BLOCK_WORDS];
        const int64_t last_step = (q_end * call.group - 1) / call.step_rows;
        item.pass(item.order, last_step + 1);
        for (int64_t step = last_step; step >= q_begin * call.group / call.step_rows; --step) {
            const int64_t first_row = step * call.step_rows;
            int rows[MAX_TILES], tiles = 0, begin[UNITS] = {}, end[UNITS] = {};
            bool any = false;
            for (; tiles * MAX_TILE_ROWS < call.step_rows && first_row + tiles * MAX_TILE_ROWS < total; ++tiles) {
                const int64_t row = first_row + tiles * MAX_TILE_ROWS;
                Expansion &here = seen[tiles];
                rows[tiles] = int(total - row < MAX_TILE_ROWS ? total - row : MAX_TILE_ROWS);
                selection.expand(item.kv_head * call.group, call.group, row, rows[tiles], item.first_key, item.keys,
                                 UNIT, here);
                if (here.unit_count && features) {
                    rules.place(item.kv_head, row, rows[tiles]);
                    rules.exclude(item.first_key, here);
                }
                for (int u = 0; u < here.unit_count; ++u) {
                    any = true;
                    const int unit = here.index[u];
                    if (end[unit] == 0) begin[unit] = tiles;
                    for (int between = end[unit]; end[unit] && between < tiles; ++between)
                        zero_rows(s, between * MAX_TILE_ROWS, MAX_TILE_ROWS, unit);
                    end[unit] = tiles + 1;
                    if (packed[unit]) continue;
                    packed[unit] = true;
                    pack_unit(s, keys, values, item.first_key, unit, finite);
                }
            }
            if (!any) {
                item.pass(item.order, step);
                continue;
            }
            if (call.grad_slopes) __builtin_memset(s.slope_sum, 0, call.step_rows * sizeof(T));
            for (int t = 0; t < tiles; ++t) {
                if (seen[t].unit_count == 0) {
                    zero_tile(s, t * MAX_TILE_ROWS);
                    continue;
                }
                const int64_t row = first_row + t * MAX_TILE_ROWS;
                pack_tile(call, item, s, seen[t], row, t * MAX_TILE_ROWS, rows[t]);
                if (features) rules.place(item.kv_head, row, rows[t]);
                if (rules.drops) rules.draw(item.first_key, seen[t], kept);
                const View view = {rules,
                                   seen[t],
                                   rules.drops ? kept : nullptr,
                                   row_lse(call, pair) + row,
                                   row_delta(call, pair) + row,
                                   rules.factor(),
                                   T(1 / call.features.kept_share),
                                   item.first_key,
                                   rows[t]};
                weigh_tile(call, item, s, view, t * MAX_TILE_ROWS);
            }
            item.wait(item.order, step);
            // Columns outside, where all keys are finite: what they read of the keys then stays in the L1 cache.
            bool clean = true;
            for (int t = 0; t < tiles; ++t)
                for (int u = 0; u < seen[t].unit_count; ++u) clean &= !seen[t].partial[u] || finite[seen[t].index[u]];
            const int64_t columns = clean ? UNIT : s.key_stride;
            for (int64_t begin_column = 0; begin_column < s.key_stride; begin_column += columns) {
                for (int t = 0; t < tiles; ++t) {
                    if (seen[t].unit_count == 0) continue;
                    const Word *key_rows[UNITS];
                    find_key_rows(s, seen[t], finite, key_rows);
                    T *sum = sum_of(call, item.batch_index, item.kv_head) +
                             (first_row + t * MAX_TILE_ROWS) * call.sum_stride[2];
                    for (int64_t column = begin_column; column < begin_column + columns && column < s.key_stride;
                         column += UNIT)
                        add_to_queries(call, s, seen[t], rows[t], t * MAX_TILE_ROWS, key_rows, column, sum);
                }
            }
            if (call.grad_slopes)
                for (int t = 0; t < tiles; ++t)
                    if (seen[t].unit_count)
                        add_slopes(call, item, s, first_row + t * MAX_TILE_ROWS, t * MAX_TILE_ROWS, rows[t]);
            item.pass(item.order, step);
            const int64_t step_rows = (tiles - 1) * MAX_TILE_ROWS + rows[tiles - 1];
            const auto sum_over_rows = [&](const Word *weight, const Word *row, int64_t stride, T *sum) {
                for (int unit = 0; unit < UNITS; ++unit) {
                    if (end[unit] == 0) continue;
                    const int64_t first = begin[unit] * MAX_TILE_ROWS, past = end[unit] * MAX_TILE_ROWS;
                    const int64_t count = (past < step_rows ? past : step_rows) - first, keys = item.keys - unit * UNIT;
                    add_to_keys(weight + first / A::PER_WORD * SCORE_STRIDE + unit * UNIT,
                                row + first / A::PER_WORD * stride, stride, (count + A::PER_WORD - 1) / A::PER_WORD,
                                keys < UNIT ? int(keys) : UNIT, sum + unit * UNIT * stride);
                }
            };
            // One after the other: the rows of both would not stay in the L1 cache.
            sum_over_rows(s.weight, s.grad_rows, s.value_stride, s.grad_value);
            sum_over_rows(s.slope, s.query_rows, s.key_stride, s.grad_key);
        }
    }

    static NOINLINE void pack_unit(const Scratch &s, const typename Packing::Matrix &keys,
                                   const typename Packing::Matrix &values, int64_t block, int unit, bool *finite) {
        Packing::keys(keys, block + unit * UNIT, s.steps, s.key + unit * UNIT * s.steps);
        Packing::keys(values, block + unit * UNIT, s.value_steps, s.value + unit * UNIT * s.value_steps);
        finite[unit] = Packing::values(keys, block + unit * UNIT,
                                       s.key_rows + unit * (UNIT / A::PER_WORD) * s.key_stride, s.key_stride);
    }

    static void add_slopes(const BackwardCall &call, const BackwardItem &item, const Scratch &s, int64_t row,
                           int row_base, int rows) {
        for (int r = 0; r < rows; ++r) {
            const int64_t head = item.kv_head * call.group + (row + r) % call.group;
            static_cast<T *>(call.grad_slopes)[call.statistic(item.batch_index, head, (row + r) / call.group)] +=
                s.slope_sum[row_base + r];
        }
    }

    static void write_keys(const BackwardCall &call, const BackwardItem &item, const Scratch &s) {
        const int64_t keys = call.k_length - item.first_key < item.keys ? call.k_length - item.first_key : item.keys;
        Input *grad_key = reinterpret_cast<Input *>(call.grad_key) + item.batch_index * call.grad_key_stride[0] +
                          item.kv_head * call.grad_key_stride[1] + item.first_key * call.grad_key_stride[2];
        Input *grad_value = reinterpret_cast<Input *>(call.grad_value) + item.batch_index * call.grad_value_stride[0] +
                            item.kv_head * call.grad_value_stride[1] + item.first_key * call.grad_value_stride[2];
        for (int64_t k = 0; k < keys; ++k) {
            store_row(s.grad_key + k * s.key_stride, T(call.scale), call.head_dim,
                      grad_key + k * call.grad_key_stride[2], call.grad_key_stride[3]);
            store_row(s.grad_value + k * s.value_stride, T(1), call.value_dim,
                      grad_value + k * call.grad_value_stride[2], call.grad_value_stride[3]);
        }
    }

    static size_t scratch_bytes(const BackwardCall &call) {
        const Scratch s(call, nullptr);
        const bool direct = DirectBackward<A>::serves(call);
        return size_t((direct ? typename DirectBackward<A>::Rows(call, s.end).end : s.end) -
                      static_cast<char *>(nullptr));
    }
    static int64_t sum_width(const BackwardCall &call) { return round_up(call.head_dim, LANES); }
    // Rows that follow each other at one stride, whole vectors of them, and a last panel that holds no row too many.
    static bool in_place(const BackwardCall &call) {
        const int64_t last = call.rows() % PANEL;
        return sizeof(Input) == sizeof(T) && call.group == 1 && call.grad_query_stride[3] == 1 &&
               call.head_dim % LANES == 0 && (last <= 2 || last == 4 || last == 8);
    }
    static constexpr BackwardKernel kernel() {
        return {scratch_bytes, prepare, run, finish, sum_width, in_place, sizeof(T), 96};
    }
};
