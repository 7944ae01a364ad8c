// Attention forward over one run of rows, for one tier: online softmax over key blocks of fixed absolute
// place. Included by each tier's source, inside its anonymous namespace, after direct.h.
//
// For each key block that the rows touch, its units (UNIT keys, two vectors wide) are packed when a tile
// first needs them, or read where they lie. Then each tile of rows computes its scores against the units that the
// schedule lists, turns them into weights and adds their product with the values to its accumulators.

template <class A> struct Forward {
    typedef typename A::Input Input;
    typedef typename A::Number T;
    typedef typename A::Word Word;
    typedef typename A::Weight Weight;
    typedef Real<T> R;
    typedef typename R::V V;
    typedef Words<Word> W;
    typedef Tiles<A> Tile;
    typedef Pack<A> Packing;
    typedef Direct<A> InPlace;
    static constexpr int LANES = Tile::LANES, UNIT = Tile::UNIT, UNITS = Tile::UNITS;
    static constexpr int SCORE_STRIDE = Tile::SCORE_STRIDE, WEIGHT_STRIDE = Tile::WEIGHT_STRIDE;

    // Everything a work item needs, laid out in one block of scratch memory.
    struct Scratch {
        int64_t steps, value_stride; // words of a query; numbers of a value, padded to whole vectors
        Word *query;                 // panels of [steps][PANEL]; in place: rows of InPlace::query_stride
        T *out, *top, *total;        // [rows][value_stride], [rows], [rows][LANES]
        Word *key;                   // units of [steps][UNIT]
        Word *value;                 // units of [UNIT / PER_WORD][value_stride]
        Word *cleaned;               // the same, with the values of unused keys zeroed
        T *score;                    // [MAX_TILE_ROWS][SCORE_STRIDE]
        Weight *weight;              // [MAX_TILE_ROWS][WEIGHT_STRIDE]
        Input *nothing;              // a row of zeros
        char *end;

        Scratch(const ForwardCall &call, int64_t rows, char *memory) {
            steps = (call.head_dim + A::PER_WORD - 1) / A::PER_WORD;
            // In place the columns of the output go two vectors at a time.
            value_stride = round_up(call.value_dim, call.direct ? UNIT : LANES);
            rows = round_up(rows, MAX_TILE_ROWS);
            end = memory;
            // Loads of a panel's last rows may read past the end of the queries.
            query = take<Word>(rows * (call.direct ? InPlace::query_stride(call.head_dim) : steps) + LANES);
            out = take<T>(rows * value_stride);
            top = take<T>(rows + LANES);
            total = take<T>(rows * LANES);
            const int64_t keys = call.direct ? 0 : KEY_BLOCK;
            key = take<Word>(keys * steps);
            value = take<Word>(keys / A::PER_WORD * value_stride);
            cleaned = take<Word>(keys / A::PER_WORD * value_stride);
            nothing = take<Input>(call.direct ? (call.head_dim > call.value_dim ? call.head_dim : call.value_dim) : 0);
            score = take<T>(MAX_TILE_ROWS * SCORE_STRIDE);
            weight = A::PER_WORD == 1 ? reinterpret_cast<Weight *>(score) : take<Weight>(MAX_TILE_ROWS * WEIGHT_STRIDE);
        }

        template <class U> U *take(int64_t count) {
            U *begin = reinterpret_cast<U *>(end);
            end += round_up(count * int64_t(sizeof(U)), 64);
            return begin;
        }
    };

    static const Input *row_pointer(const ForwardCall &call, const ForwardItem &item, int64_t row) {
        const int64_t head = item.kv_head * call.group + row % call.group;
        return reinterpret_cast<const Input *>(call.query) + item.batch_index * call.query_stride[0] +
               head * call.query_stride[1] + row / call.group * call.query_stride[2];
    }

    static NOINLINE void pack_queries(const ForwardCall &call, const ForwardItem &item, const Scratch &s) {
        const Input *row[MAX_TILE_ROWS];
        for (int64_t first = 0; first < item.rows; first += MAX_TILE_ROWS) {
            const int64_t left = item.rows - first, rows = left < MAX_TILE_ROWS ? left : MAX_TILE_ROWS;
            for (int64_t r = 0; r < rows; ++r) row[r] = row_pointer(call, item, item.first_row + first + r);
            Packing::panels(row, rows, call.query_stride[3], call.head_dim, s.steps, s.query + first * s.steps,
                            call.scale < 0);
        }
        if (call.scale == 0) __builtin_memset(s.query, 0, round_up(item.rows, PANEL) * s.steps * sizeof(Word));
    }

    // The queries for reading keys in place: rows of words, zero past the last number and the last row.
    static NOINLINE void copy_queries(const ForwardCall &call, const ForwardItem &item, const Scratch &s) {
        const int64_t stride = InPlace::query_stride(call.head_dim);
        __builtin_memset(s.query, 0, round_up(item.rows, InPlace::MAX_ROWS) * stride * sizeof(Word));
        if (call.scale == 0) return;
        for (int64_t r = 0; r < item.rows; ++r) {
            const Input *row = row_pointer(call, item, item.first_row + r);
            for (int64_t step = 0; step < s.steps; ++step) {
                const Word word = Packing::word_at(row, call.query_stride[3], step, call.head_dim);
                s.query[r * stride + step] = call.scale < 0 ? A::negate(word) : word;
            }
        }
    }

    // Applies what follows the product to the scores of a panel against one unit: the features, -inf where a pair
    // does not count, and the largest of each row by lane. While they are in the L1 cache: the keys of a whole block,
    // read in between, would have pushed them out.
    template <int M>
    static INLINE void settle(const Rules<A> &rules, int first, int64_t block, const Expansion &seen, int u, T *score,
                              V *largest) {
        if (rules.active) rules.template apply<M>(first, block + seen.index[u] * UNIT, score, SCORE_STRIDE, nullptr);
        if (seen.partial[u]) {
            const int key = seen.index[u] * UNIT;
            for (int m = 0; m < M; ++m) {
                T *at = score + m * SCORE_STRIDE;
                const uint64_t row = seen.row[first + m][key / 64] >> (key % 64), half = (uint64_t(1) << LANES) - 1;
                R::store(at, R::keep(R::load(at), uint32_t(row & half)));
                R::store(at + LANES, R::keep(R::load(at + LANES), uint32_t(row >> LANES & half)));
            }
        }
        for (int m = 0; m < M; ++m) {
            const T *at = score + m * SCORE_STRIDE;
            largest[m] = R::max(largest[m], R::max(R::load(at), R::load(at + LANES)));
        }
    }

    template <int M>
    static INLINE void value_columns(const Scratch &s, const Weight *weight, const Word *const *value, int units,
                                     T *out, const T *decay) {
        int64_t column = 0;
        for (; column + UNIT <= s.value_stride; column += UNIT)
            Tile::template value_tile<M, 2>(weight, value, column, s.value_stride, units, out + column, s.value_stride,
                                            decay);
        if (column < s.value_stride)
            Tile::template value_tile<M, 1>(weight, value, column, s.value_stride, units, out + column, s.value_stride,
                                            decay);
    }

    // Scores of one row become weights 2^(factor * score - shift); returns their sums by lane.
    static INLINE V row_weights(int units, const T *score, Weight *weight, T factor, T shift) {
        V sum = {}, second_sum = {};
        const V scale = R::set1(factor), offset = R::set1(-shift);
        for (int u = 0; u < units; ++u) {
            const V a = R::template exp2<A::EXP_DEGREE>(R::load(score + u * UNIT) * scale + offset);
            const V b = R::template exp2<A::EXP_DEGREE>(R::load(score + u * UNIT + LANES) * scale + offset);
            sum += a;
            second_sum += b;
            A::store_weights(weight + u * UNIT, a, b);
        }
        return sum + second_sum;
    }

    // What a tile of rows reads of one key block: packed units, or rows in place.
    struct Operands {
        const Word *value[UNITS];
        const Input *key_row[KEY_BLOCK], *value_row[KEY_BLOCK];
        const Input *next_key[KEY_BLOCK], *next_value[KEY_BLOCK]; // of some units later, where there are pages
        typename InPlace::Ahead ahead_key, ahead_value;
        int keys; // of the listed units, without those behind the last that a row uses
    };

    // One tile of rows against the listed units of one key block. `top` holds each row's maximum so far, in
    // units of log2, `total` the sum of its weights by lane.
    template <bool DIRECT>
    static NOINLINE void visit(const ForwardCall &call, const Scratch &s, const Word *query, const Rules<A> &rules,
                               int64_t block, const Expansion &seen, const Operands &operands, int rows, T *out, T *top,
                               T *total) {
        constexpr int PADDED = MAX_TILE_ROWS + LANES;
        const T factor = rules.factor();
        alignas(64) T shift[PADDED], decay[PADDED];
        for (int r = 0; r < MAX_TILE_ROWS; ++r) shift[r] = -T(__builtin_inff());
        typename Tile::Listed listed[MAX_TILE_ROWS / PANEL]; // by panel
        if constexpr (DIRECT) {
            for (int u = 0; u < seen.unit_count; ++u)
                InPlace::scores(query, InPlace::query_stride(call.head_dim), rows, operands.key_row + u * UNIT,
                                operands.ahead_key + u * UNIT,
                                operands.keys - u * UNIT < UNIT ? operands.keys - u * UNIT : UNIT, call.head_dim,
                                s.score + u * UNIT);
        }
        Tile::for_panels(rows, [&](int first, auto count) {
            constexpr int M = decltype(count)::value;
            V largest[M];
            for (int m = 0; m < M; ++m) largest[m] = R::set1(-T(__builtin_inff()));
            typename Tile::Listed &own = listed[first / PANEL];
            // In place the scores of all units are there already, and unlisted ones come out as weights of 0.
            if constexpr (DIRECT) own = all_units(seen);
            else Tile::list_units(seen, first, first + M < rows ? M : rows - first, own);
            T *score = s.score + first * SCORE_STRIDE;
            for (int n = 0; n < own.count; ++n, score += UNIT) {
                if constexpr (!DIRECT)
                    Tile::template score_tile<M>(query + first * s.steps,
                                                 s.key + seen.index[own.at[n]] * s.steps * UNIT, s.steps, score);
                settle<M>(rules, first, block, seen, own.at[n], score, largest);
            }
            for (int m = 0; m < M && first + m < rows; ++m) shift[first + m] = R::reduce_max(largest[m]);
        });
        const V lowest = R::set1(-T(__builtin_inff()));
        for (int r = 0; r < rows; r += LANES) {
            // 16 lanes reach into the next tile's rows, whose maximum must stay.
            V found = R::load(shift + r) * R::set1(factor);
            if (r + LANES > MAX_TILE_ROWS) found = R::keep(found, (1u << (MAX_TILE_ROWS - r)) - 1);
            const V before = R::load(top + r), after = found > before ? found : before;
            // A row that has seen no key yet has no maximum to subtract.
            const V subtract = after == lowest ? V{} : after;
            R::store(top + r, after);
            R::store(shift + r, subtract);
            // Exactly 1 where nothing changed: the polynomial's 2^0 is off by its own error, which would
            // compound from block to block.
            const V shrunk = R::template exp2<A::EXP_DEGREE>(before - subtract);
            R::store(decay + r, after == before ? R::set1(1) : shrunk);
        }
        for (int r = 0; r < rows; ++r) {
            const V sum = row_weights(listed[r / PANEL].count, s.score + r * SCORE_STRIDE, s.weight + r * WEIGHT_STRIDE,
                                      factor, shift[r]);
            R::store(total + r * LANES, R::load(total + r * LANES) * decay[r] + sum);
        }
        if (rules.drops) drop_weights(rules, block, seen, listed, rows, s.weight);
        if constexpr (DIRECT) {
            InPlace::values(s.weight, rows, operands.value_row, operands.ahead_value, operands.keys, call.value_dim,
                            out, s.value_stride, decay);
        } else {
            Tile::for_panels(rows, [&](int first, auto count) {
                const typename Tile::Listed &own = listed[first / PANEL];
                const Word *value[UNITS];
                for (int n = 0; n < own.count; ++n) value[n] = operands.value[own.at[n]];
                if (own.count)
                    value_columns<decltype(count)::value>(s, s.weight + first * WEIGHT_STRIDE, value, own.count,
                                                          out + first * s.value_stride, decay + first);
            });
        }
    }

    static typename Tile::Listed all_units(const Expansion &seen) {
        typename Tile::Listed listed;
        listed.count = seen.unit_count;
        for (int u = 0; u < seen.unit_count; ++u) listed.at[u] = uint8_t(u);
        return listed;
    }

    static NOINLINE void drop_weights(const Rules<A> &rules, int64_t block, const Expansion &seen,
                                      const typename Tile::Listed *listed, int rows, Weight *weight) {
        uint64_t kept[MAX_TILE_ROWS][BLOCK_WORDS];
        rules.draw(block, seen, kept);
        for (int r = 0; r < rows; ++r) {
            const typename Tile::Listed &own = listed[r / PANEL];
            for (int n = 0; n < own.count; ++n) {
                const int key = seen.index[own.at[n]] * UNIT;
                A::drop(weight + r * WEIGHT_STRIDE + n * UNIT, kept[r][key / 64] >> (key % 64) & Rules<A>::ALL);
            }
        }
    }

    // Divides the sums of a run of rows by their totals and writes them out.
    static NOINLINE void finish(const ForwardCall &call, const ForwardItem &item, const Scratch &s) {
        const Features &f = call.features;
        int64_t query = item.first_row / call.group, member = item.first_row % call.group;
        for (int64_t r = 0; r < item.rows; ++r, ++member) {
            if (member == call.group) {
                member = 0;
                ++query;
            }
            const int64_t head = item.kv_head * call.group + member;
            T total = R::reduce_add(R::load(s.total + r * LANES)), top = s.top[r], shrink = 1;
            if (f.sinks.data) {
                const T sink = number<T>(f.sinks.data, f.sinks.dtype, head * f.sinks.stride[0]) * T(LOG2_E);
                if (total == 0) top = -T(__builtin_inff());
                const T most = sink > top ? sink : top, subtract = most == -T(__builtin_inff()) ? 0 : most;
                shrink = exp2_of(top - subtract);
                total = (total == 0 ? 0 : total * shrink) + exp2_of(sink - subtract);
                top = most;
            }
            const T inverse = total == 0 ? 0 : shrink / (total * T(f.kept_share));
            const T *source = s.out + r * s.value_stride;
            Input *target = reinterpret_cast<Input *>(call.out) + item.batch_index * call.out_stride[0] +
                            head * call.out_stride[1] + query * call.out_stride[2];
            int64_t d = 0;
            if (call.out_stride[3] == 1)
                for (; d + LANES <= call.value_dim; d += LANES) narrow(target + d, R::load(source + d) * inverse);
            for (; d < call.value_dim; ++d) narrow1(target + d * call.out_stride[3], source[d] * inverse);
            if (call.lse)
                static_cast<T *>(call.lse)[call.statistic(item.batch_index, head, query)] =
                    total == 0 ? -T(__builtin_inff()) : (top + R::log2(total)) * T(LN_2);
        }
    }

    // Sums over some of the keys, to be merged with others: [rows][value_stride], then each row's total and top.
    static void store_part(const ForwardItem &item, const Scratch &s) {
        T *out = reinterpret_cast<T *>(item.partial), *total = out + item.rows * s.value_stride,
          *top = total + item.rows;
        __builtin_memcpy(out, s.out, item.rows * s.value_stride * sizeof(T));
        for (int64_t r = 0; r < item.rows; ++r) {
            total[r] = R::reduce_add(R::load(s.total + r * LANES));
            top[r] = s.top[r];
        }
    }

    static size_t partial_bytes(const ForwardCall &call, int64_t rows) {
        const Scratch s(call, rows, nullptr);
        return size_t(round_up(rows * (s.value_stride + 2) * int64_t(sizeof(T)), 64));
    }

    static void merge(const ForwardCall &call, const ForwardItem &item, const char *parts, int64_t count,
                      char *memory) {
        const Scratch s(call, call.block_rows, memory);
        const size_t bytes = partial_bytes(call, item.rows);
        __builtin_memset(s.out, 0, item.rows * s.value_stride * sizeof(T));
        __builtin_memset(s.total, 0, item.rows * LANES * sizeof(T));
        for (int64_t r = 0; r < item.rows; ++r) s.top[r] = -T(__builtin_inff());
        for (int64_t p = 0; p < count; ++p) {
            const T *out = reinterpret_cast<const T *>(parts + p * bytes), *total = out + item.rows * s.value_stride,
                    *top = total + item.rows;
            for (int64_t r = 0; r < item.rows; ++r) {
                if (total[r] == 0) continue;
                const T before = s.top[r], after = top[r] > before ? top[r] : before;
                const T subtract = after == -T(__builtin_inff()) ? 0 : after;
                const T shrink = exp2_of(before - subtract), grow = exp2_of(top[r] - subtract);
                s.top[r] = after;
                s.total[r * LANES] = s.total[r * LANES] * shrink + total[r] * grow;
                T *sum = s.out + r * s.value_stride;
                for (int64_t d = 0; d < s.value_stride; d += LANES)
                    R::store(sum + d, R::load(sum + d) * shrink + R::load(out + r * s.value_stride + d) * grow);
            }
        }
        finish(call, item, s);
    }

    // Exact where the argument is 0, as visit's decay.
    static T exp2_of(T x) { return x == 0 ? T(1) : R::template exp2<5>(R::set1(x))[0]; }

    // Packs what the tile needs of the block and is not yet packed.
    static INLINE void pack_block(const Scratch &s, const typename Packing::Matrix &keys,
                                  const typename Packing::Matrix &values, int64_t block, const Expansion &seen,
                                  bool *packed, bool *finite, Operands &operands) {
        for (int u = 0; u < seen.unit_count; ++u) {
            const int unit = seen.index[u];
            Word *packed_values = s.value + unit * (UNIT / A::PER_WORD) * s.value_stride;
            if (!packed[unit]) {
                packed[unit] = true;
                Packing::keys(keys, block + unit * UNIT, s.steps, s.key + unit * UNIT * s.steps);
                finite[unit] = Packing::values(values, block + unit * UNIT, packed_values, s.value_stride);
            }
            operands.value[u] = packed_values;
            if (seen.partial[u] && !finite[unit]) {
                Word *cleaned = s.cleaned + (packed_values - s.value);
                Packing::clean(packed_values, seen.used, unit, s.value_stride, cleaned);
                operands.value[u] = cleaned;
            }
        }
    }

    // Rows to ask for: those of a later unit, or past the end the unit's own first again.
    static INLINE void find_next(const typename Packing::Matrix &matrix, int64_t first, int count,
                                 const Input *const *row, const Input **next) {
        const int64_t left = matrix.length - first;
        const int there = left <= 0 ? 0 : left < count ? int(left) : count;
        if (there) matrix.rows(first, there, next);
        for (int r = there; r < count; ++r) next[r] = row[0];
    }

    // Where the keys and values of the listed units lie; zeros stand for those that no row uses. Behind the last used
    // key of the last unit nothing is looked up but what fills a vector of keys: pointers to 128 rows for a single key
    // were a third of a tiny call.
    static INLINE void find_rows(const ForwardCall &call, const Scratch &s, const typename Packing::Matrix &keys,
                                 const typename Packing::Matrix &values, int64_t block, const Expansion &seen,
                                 Operands &operands) {
        const int64_t row_bytes = call.head_dim * int64_t(sizeof(Input));
        const int64_t ahead = round_up(call.prefetch_bytes / row_bytes, UNIT);
        // Pages may follow each other anywhere. Other rows lie at one stride, and what lies behind the last is asked
        // for in vain.
        const bool follows = seen.unit_count && block + seen.index[0] * UNIT + ahead < call.k_length, paged = keys.page;
        operands.ahead_key = {!follows ? nullptr
                              : paged  ? operands.next_key
                                       : operands.key_row,
                              paged ? 0 : ahead * keys.row_stride};
        operands.ahead_value = {!follows ? nullptr
                                : paged  ? operands.next_value
                                         : operands.value_row,
                                paged ? 0 : ahead * values.row_stride};
        for (int u = 0; u < seen.unit_count; ++u) {
            const int key = seen.index[u] * UNIT;
            const int64_t first = block + key;
            uint64_t used = Rules<A>::ALL;
            int count = UNIT;
            operands.keys = (u + 1) * UNIT;
            if (seen.partial[u]) {
                used &= seen.used[key / 64] >> (key % 64);
                const int last = 64 - __builtin_clzll(used);
                operands.keys = u * UNIT + int(round_up(last, A::PER_WORD));
                if (u + 1 == seen.unit_count) count = int(round_up(last, LANES));
            }
            const Input **key_row = operands.key_row + u * UNIT, **value_row = operands.value_row + u * UNIT;
            keys.rows(first, count, key_row);
            values.rows(first, count, value_row);
            if (follows && paged) {
                find_next(keys, first + ahead, count, key_row, operands.next_key + u * UNIT);
                find_next(values, first + ahead, count, value_row, operands.next_value + u * UNIT);
            }
            if (!seen.partial[u]) continue;
            for (int k = 0; k < count; ++k) {
                if (used >> k & 1) continue;
                key_row[k] = value_row[k] = s.nothing;
            }
        }
    }

    static void run(const ForwardCall &call, const ForwardItem &item, char *memory) {
        const Scratch s(call, call.block_rows, memory);
        if (call.direct) {
            copy_queries(call, item, s);
            __builtin_memset(s.nothing, 0,
                             (call.head_dim > call.value_dim ? call.head_dim : call.value_dim) * sizeof(Input));
        } else {
            // The sign of the scale travels with the queries: the maximum is then one of the scores.
            pack_queries(call, item, s);
        }
        __builtin_memset(s.out, 0, item.rows * s.value_stride * sizeof(T));
        __builtin_memset(s.total, 0, item.rows * LANES * sizeof(T));
        for (int64_t r = 0; r < round_up(item.rows, MAX_TILE_ROWS) + LANES; ++r) s.top[r] = -T(__builtin_inff());

        const int64_t q_begin = item.first_row / call.group, q_end = (item.first_row + item.rows - 1) / call.group + 1;
        AtomSelection selection(*call.schedule, item.batch_index, q_begin, q_end);
        int64_t low, high;
        selection.hull(q_begin, q_end, low, high);
        low = low > item.key_begin ? low : item.key_begin;
        high = high < item.key_end ? high : item.key_end;
        const typename Packing::Matrix keys(call.key, call.key_stride, call, item.batch_index, item.kv_head,
                                            call.head_dim);
        const typename Packing::Matrix values(call.value, call.value_stride, call, item.batch_index, item.kv_head,
                                              call.value_dim);
        Rules<A> rules(call, item.batch_index);
        Expansion seen;
        Operands operands;
        for (int64_t block = low / KEY_BLOCK * KEY_BLOCK; block < high; block += KEY_BLOCK) {
            bool packed[UNITS] = {}, finite[UNITS];
            for (int64_t first = 0; first < item.rows; first += MAX_TILE_ROWS) {
                const int rows = int(item.rows - first < MAX_TILE_ROWS ? item.rows - first : MAX_TILE_ROWS);
                selection.expand(item.kv_head * call.group, call.group, item.first_row + first, rows, block, KEY_BLOCK,
                                 UNIT, seen);
                if (seen.unit_count == 0) continue;
                if (rules.active || rules.drops) {
                    rules.place(item.kv_head, item.first_row + first, rows);
                    rules.exclude(block, seen);
                    if (seen.unit_count == 0) continue;
                }
                T *out = s.out + first * s.value_stride, *top = s.top + first, *total = s.total + first * LANES;
                if (call.direct) {
                    find_rows(call, s, keys, values, block, seen, operands);
                    visit<true>(call, s, s.query + first * InPlace::query_stride(call.head_dim), rules, block, seen,
                                operands, rows, out, top, total);
                } else {
                    pack_block(s, keys, values, block, seen, packed, finite, operands);
                    visit<false>(call, s, s.query + first * s.steps, rules, block, seen, operands, rows, out, top,
                                 total);
                }
            }
        }
        if (item.partial) store_part(item, s);
        else finish(call, item, s);
    }

    static size_t scratch_bytes(const ForwardCall &call) {
        return size_t(Scratch(call, call.block_rows, nullptr).end - static_cast<char *>(nullptr));
    }
    static size_t row_bytes(const ForwardCall &call) {
        const int64_t steps = (call.head_dim + A::PER_WORD - 1) / A::PER_WORD;
        return steps * sizeof(Word) + (round_up(call.value_dim, LANES) + LANES + 1) * sizeof(T);
    }
    static constexpr ForwardKernel kernel() { return {scratch_bytes, row_bytes, run, partial_bytes, merge}; }
};
