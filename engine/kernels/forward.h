// Attention forward over one run of rows, for one tier: online softmax over key blocks of fixed absolute
// place. Included by each tier's source, inside its anonymous namespace, after pack.h.
//
// For each key block that the rows touch, its units (UNIT keys, two vectors wide) are packed when a tile
// first needs them. Then each tile of rows computes its scores against the units that the schedule lists,
// turns them into weights and adds their product with the values to its accumulators.

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

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
    static constexpr int LANES = Tile::LANES, UNIT = Tile::UNIT, UNITS = Tile::UNITS;
    static constexpr int SCORE_STRIDE = Tile::SCORE_STRIDE, WEIGHT_STRIDE = Tile::WEIGHT_STRIDE;

    // Everything a work item needs, laid out in one block of scratch memory.
    struct Scratch {
        int64_t steps, value_stride; // words of a query; numbers of a value, padded to whole vectors
        Word *query;                 // panels of [steps][PANEL]
        T *out, *top, *total;        // [rows][value_stride], [rows], [rows][LANES]
        Word *key;                   // units of [steps][UNIT]
        Word *value;                 // units of [UNIT / PER_WORD][value_stride]
        Word *cleaned;               // the same, with the values of unused keys zeroed
        T *score;                    // [MAX_TILE_ROWS][SCORE_STRIDE]
        Weight *weight;              // [MAX_TILE_ROWS][WEIGHT_STRIDE]
        char *end;

        Scratch(const ForwardCall &call, int64_t rows, char *memory) {
            steps = (call.head_dim + A::PER_WORD - 1) / A::PER_WORD;
            value_stride = round_up(call.value_dim, LANES);
            rows = round_up(rows, MAX_TILE_ROWS);
            end = memory;
            // Loads of a panel's last rows may read past the end of the queries.
            query = take<Word>(rows * steps + LANES);
            out = take<T>(rows * value_stride);
            top = take<T>(rows + LANES);
            total = take<T>(rows * LANES);
            key = take<Word>(KEY_BLOCK * steps);
            value = take<Word>(KEY_BLOCK / A::PER_WORD * value_stride);
            cleaned = take<Word>(KEY_BLOCK / A::PER_WORD * value_stride);
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
        const Input *row[LANES];
        for (int64_t first = 0; first < item.rows; first += PANEL) {
            // The last part first: what it writes past the panel falls into the next step's first rows.
            for (int part = (PANEL - 1) / LANES * LANES; part >= 0; part -= LANES) {
                const int64_t left = item.rows - first - part;
                const int count = int(left < 0 ? 0 : left < LANES ? left : LANES);
                for (int r = 0; r < count; ++r) row[r] = row_pointer(call, item, item.first_row + first + part + r);
                Packing::columns(row, count < PANEL - part ? count : PANEL - part, call.query_stride[3], call.head_dim,
                                 s.steps, s.query + first * s.steps + part, PANEL, call.scale < 0);
            }
        }
        if (call.scale == 0) __builtin_memset(s.query, 0, round_up(item.rows, PANEL) * s.steps * sizeof(Word));
    }

    // Scores of a panel, -inf where a pair does not count, and the largest of each row by lane. Both follow each
    // unit while it is in the L1 cache: the keys of a whole block, read in between, would have pushed it out.
    template <int M>
    static INLINE void score_units(const Scratch &s, const Word *query, const Expansion &seen,
                                   const uint64_t (*bits)[BLOCK_WORDS], T *score, V *largest) {
        for (int m = 0; m < M; ++m) largest[m] = R::set1(-T(__builtin_inff()));
        for (int u = 0; u < seen.unit_count; ++u, score += UNIT) {
            Tile::template score_tile<M>(query, s.key + seen.index[u] * s.steps * UNIT, s.steps, score);
            if (seen.partial[u]) {
                const int first = seen.index[u] * UNIT;
                for (int m = 0; m < M; ++m) {
                    T *at = score + m * SCORE_STRIDE;
                    const uint64_t row = bits[m][first / 64] >> (first % 64), half = (uint64_t(1) << LANES) - 1;
                    R::store(at, R::keep(R::load(at), uint32_t(row & half)));
                    R::store(at + LANES, R::keep(R::load(at + LANES), uint32_t(row >> LANES & half)));
                }
            }
            for (int m = 0; m < M; ++m) {
                const T *at = score + m * SCORE_STRIDE;
                largest[m] = R::max(largest[m], R::max(R::load(at), R::load(at + LANES)));
            }
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
    static INLINE V row_weights(const Expansion &seen, const T *score, Weight *weight, T factor, T shift) {
        V sum = {}, second_sum = {};
        const V scale = R::set1(factor), offset = R::set1(-shift);
        for (int u = 0; u < seen.unit_count; ++u) {
            const V a = R::template exp2<A::EXP_DEGREE>(R::load(score + u * UNIT) * scale + offset);
            const V b = R::template exp2<A::EXP_DEGREE>(R::load(score + u * UNIT + LANES) * scale + offset);
            sum += a;
            second_sum += b;
            A::store_weights(weight + u * UNIT, a, b);
        }
        return sum + second_sum;
    }

    // One tile of rows against the listed units of one key block. `top` holds each row's maximum so far, in
    // units of log2, `total` the sum of its weights by lane.
    static NOINLINE void visit(const Scratch &s, const Word *query, const Expansion &seen, const Word *const *value,
                               int rows, T factor, T *out, T *top, T *total) {
        constexpr int PADDED = MAX_TILE_ROWS + LANES;
        alignas(64) T shift[PADDED], decay[PADDED];
        for (int r = 0; r < MAX_TILE_ROWS; ++r) shift[r] = -T(__builtin_inff());
        Tile::for_panels(rows, [&](int first, auto count) {
            constexpr int M = decltype(count)::value;
            V largest[M];
            score_units<M>(s, query + first * s.steps, seen, seen.row + first, s.score + first * SCORE_STRIDE, largest);
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
            const V sum = row_weights(seen, s.score + r * SCORE_STRIDE, s.weight + r * WEIGHT_STRIDE, factor, shift[r]);
            R::store(total + r * LANES, R::load(total + r * LANES) * decay[r] + sum);
        }
        Tile::for_panels(rows, [&](int first, auto count) {
            value_columns<decltype(count)::value>(s, s.weight + first * WEIGHT_STRIDE, value, seen.unit_count,
                                                  out + first * s.value_stride, decay + first);
        });
    }

    static NOINLINE void finish(const ForwardCall &call, const ForwardItem &item, const Scratch &s) {
        int64_t query = item.first_row / call.group, member = item.first_row % call.group;
        for (int64_t r = 0; r < item.rows; ++r, ++member) {
            if (member == call.group) {
                member = 0;
                ++query;
            }
            const int64_t head = item.kv_head * call.group + member;
            const T total = R::reduce_add(R::load(s.total + r * LANES));
            const T inverse = total == 0 ? 0 : 1 / total;
            const T *source = s.out + r * s.value_stride;
            Input *target = reinterpret_cast<Input *>(call.out) + item.batch_index * call.out_stride[0] +
                            head * call.out_stride[1] + query * call.out_stride[2];
            int64_t d = 0;
            if (call.out_stride[3] == 1)
                for (; d + LANES <= call.value_dim; d += LANES) narrow(target + d, R::load(source + d) * inverse);
            for (; d < call.value_dim; ++d) narrow1(target + d * call.out_stride[3], source[d] * inverse);
            if (call.lse)
                static_cast<T *>(call.lse)[(item.batch_index * call.heads + head) * call.q_length + query] =
                    total == 0 ? -T(__builtin_inff()) : (s.top[r] + R::log2(total)) * T(LN_2);
        }
    }

    static void run(const ForwardCall &call, const ForwardItem &item, char *memory) {
        const Scratch s(call, call.block_rows, memory);
        const Schedule &schedule = *call.schedule;
        // The sign of the scale travels with the queries: the maximum is then one of the scores.
        const double magnitude = call.scale < 0 ? -call.scale : call.scale == 0 ? 1 : call.scale;
        const T factor = T(magnitude * LOG2_E);
        pack_queries(call, item, s);
        __builtin_memset(s.out, 0, item.rows * s.value_stride * sizeof(T));
        __builtin_memset(s.total, 0, item.rows * LANES * sizeof(T));
        for (int64_t r = 0; r < round_up(item.rows, MAX_TILE_ROWS) + LANES; ++r) s.top[r] = -T(__builtin_inff());

        AtomSelection selection(schedule, item.batch_index, item.first_row / call.group,
                                (item.first_row + item.rows - 1) / call.group + 1);
        int64_t low, high;
        selection.hull(item.first_row / call.group, (item.first_row + item.rows - 1) / call.group + 1, low, high);
        const typename Packing::Matrix keys(call.key, call.key_stride, item.batch_index, item.kv_head, call.k_length,
                                            call.head_dim);
        const typename Packing::Matrix values(call.value, call.value_stride, item.batch_index, item.kv_head,
                                              call.k_length, call.value_dim);
        Expansion seen;
        for (int64_t block = low / KEY_BLOCK * KEY_BLOCK; block < high; block += KEY_BLOCK) {
            bool packed[UNITS] = {}, finite[UNITS];
            for (int64_t first = 0; first < item.rows; first += MAX_TILE_ROWS) {
                const int rows = int(item.rows - first < MAX_TILE_ROWS ? item.rows - first : MAX_TILE_ROWS);
                selection.expand(item.kv_head * call.group, call.group, item.first_row + first, rows, block, UNIT,
                                 seen);
                if (seen.unit_count == 0) continue;
                const Word *value[UNITS];
                for (int u = 0; u < seen.unit_count; ++u) {
                    const int unit = seen.index[u];
                    Word *packed_values = s.value + unit * (UNIT / A::PER_WORD) * s.value_stride;
                    if (!packed[unit]) {
                        packed[unit] = true;
                        Packing::keys(keys, block + unit * UNIT, s.steps, s.key + unit * UNIT * s.steps);
                        finite[unit] = Packing::values(values, block + unit * UNIT, packed_values, s.value_stride);
                    }
                    value[u] = packed_values;
                    if (seen.partial[u] && !finite[unit]) {
                        Word *cleaned = s.cleaned + (packed_values - s.value);
                        Packing::clean(packed_values, seen.used, unit, s.value_stride, cleaned);
                        value[u] = cleaned;
                    }
                }
                visit(s, s.query + first * s.steps, seen, value, rows, factor, s.out + first * s.value_stride,
                      s.top + first, s.total + first * LANES);
            }
        }
        finish(call, item, s);
    }

    static size_t scratch_bytes(const ForwardCall &call) {
        return size_t(Scratch(call, call.block_rows, nullptr).end - static_cast<char *>(nullptr));
    }
    static size_t row_bytes(const ForwardCall &call) {
        const int64_t steps = (call.head_dim + A::PER_WORD - 1) / A::PER_WORD;
        return steps * sizeof(Word) + (round_up(call.value_dim, LANES) + LANES + 1) * sizeof(T);
    }
    static constexpr ForwardKernel kernel() { return {scratch_bytes, row_bytes, run}; }
};
