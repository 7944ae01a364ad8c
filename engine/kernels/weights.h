// The weights themselves, given the log-sum-exp: dense, as lists of the pairs that count, or only how many. Included by
// each tier's source, inside its anonymous namespace, after backward.h.

template <class A> struct Weights {
    typedef typename A::Input Input;
    typedef typename A::Number T;
    typedef typename A::Word Word;
    typedef Real<T> R;
    typedef typename R::V V;
    typedef Tiles<A> Tile;
    typedef Pack<A> Packing;
    static constexpr int LANES = Tile::LANES, UNIT = Tile::UNIT, UNITS = Tile::UNITS;
    static constexpr int SCORE_STRIDE = Tile::SCORE_STRIDE;

    struct Scratch {
        int64_t steps;
        Word *query, *key; // panels of a tile's rows; units of a block
        T *score;          // [PANEL][SCORE_STRIDE]
        char *end;

        Scratch(const WeightsCall &call, char *memory) {
            steps = (call.head_dim + A::PER_WORD - 1) / A::PER_WORD;
            end = memory;
            query = take<Word>(MAX_TILE_ROWS * steps + LANES);
            key = take<Word>(KEY_BLOCK * steps);
            score = take<T>(PANEL * SCORE_STRIDE);
        }
        template <class U> U *take(int64_t count) {
            U *begin = reinterpret_cast<U *>(end);
            end += round_up(count * int64_t(sizeof(U)), 64);
            return begin;
        }
    };

    // What is known of the rows of a tile.
    struct Row {
        int64_t query, head, at, next; // at: among (batch, heads, q_length); next: of its pairs
        T lse;
    };

    static int64_t count_bits(uint64_t x) {
        int64_t count = 0;
        for (; x; x &= x - 1) ++count;
        return count;
    }

    // Bits of a row's keys in a unit of the block at `block`.
    static INLINE uint64_t bits_of(const WeightsCall &call, const Expansion &seen, int u, int r, int64_t block) {
        const int key = seen.index[u] * UNIT;
        if (seen.partial[u]) return seen.row[r][key / 64] >> (key % 64) & Rules<A>::ALL;
        const int64_t left = call.k_length - block - key;
        return left >= UNIT ? Rules<A>::ALL : (uint64_t(1) << left) - 1;
    }

    static void run(const WeightsCall &call, const ForwardItem &item, char *memory) {
        const Scratch s(call, memory);
        const typename Packing::Matrix keys(call.key, call.key_stride, call, item.batch_index, item.kv_head,
                                            call.head_dim);
        Rules<A> rules(call, item.batch_index);
        rules.magnitude = T(call.scale);
        Expansion seen;
        Row row[MAX_TILE_ROWS];
        for (int64_t first = item.first_row; first < item.first_row + item.rows; first += MAX_TILE_ROWS) {
            const int64_t left = item.first_row + item.rows - first;
            const int rows = int(left < MAX_TILE_ROWS ? left : MAX_TILE_ROWS);
            const int64_t q_begin = first / call.group, q_end = (first + rows - 1) / call.group + 1;
            const AtomSelection selection(*call.schedule, item.batch_index, q_begin, q_end);
            begin_rows(call, item, s, first, rows, row);
            rules.place(item.kv_head, first, rows);
            int64_t low, high;
            selection.hull(q_begin, q_end, low, high);
            for (int64_t block = low / KEY_BLOCK * KEY_BLOCK; block < high; block += KEY_BLOCK) {
                selection.expand(item.kv_head * call.group, call.group, first, rows, block, KEY_BLOCK, UNIT, seen);
                rules.exclude(block, seen);
                if (seen.unit_count) visit(call, item, s, rules, keys, block, seen, rows, row);
            }
            if (call.counts)
                for (int r = 0; r < rows; ++r) call.counts[row[r].at] = row[r].next;
        }
    }

    static void begin_rows(const WeightsCall &call, const ForwardItem &item, const Scratch &s, int64_t first, int rows,
                           Row *row) {
        const Input *query[MAX_TILE_ROWS];
        for (int r = 0; r < rows; ++r) {
            Row &here = row[r];
            here.query = (first + r) / call.group;
            here.head = item.kv_head * call.group + (first + r) % call.group;
            here.at = call.statistic(item.batch_index, here.head, here.query);
            here.next = call.row_begin ? call.row_begin[here.at] : 0;
            const T lse = call.lse ? static_cast<const T *>(call.lse)[here.at] : 0;
            // Scores of -inf alone: +inf makes them weights of 0.
            here.lse = lse == -T(__builtin_inff()) ? -lse : lse * T(LOG2_E);
            query[r] = reinterpret_cast<const Input *>(call.query) + item.batch_index * call.query_stride[0] +
                       here.head * call.query_stride[1] + here.query * call.query_stride[2];
            if (call.weights) {
                Input *line = line_of(call, item, here);
                if (call.weights_stride[3] == 1) __builtin_memset(line, 0, size_t(call.k_length) * sizeof(Input));
                else
                    for (int64_t k = 0; k < call.k_length; ++k) line[k * call.weights_stride[3]] = Input{};
            }
        }
        Packing::panels(query, rows, call.query_stride[3], call.head_dim, s.steps, s.query, false);
    }

    static Input *line_of(const WeightsCall &call, const ForwardItem &item, const Row &row) {
        return reinterpret_cast<Input *>(call.weights) + item.batch_index * call.weights_stride[0] +
               row.head * call.weights_stride[1] + row.query * call.weights_stride[2];
    }

    static void visit(const WeightsCall &call, const ForwardItem &item, const Scratch &s, const Rules<A> &rules,
                      const typename Packing::Matrix &keys, int64_t block, const Expansion &seen, int rows, Row *row) {
        if (call.counts) {
            for (int r = 0; r < rows; ++r)
                for (int u = 0; u < seen.unit_count; ++u) row[r].next += count_bits(bits_of(call, seen, u, r, block));
            return;
        }
        uint64_t kept[MAX_TILE_ROWS][BLOCK_WORDS];
        if (rules.drops) rules.draw(block, seen, kept);
        for (int u = 0; u < seen.unit_count; ++u)
            Packing::keys(keys, block + seen.index[u] * UNIT, s.steps, s.key + u * UNIT * s.steps);
        const T factor = rules.factor(), grow = T(1 / call.features.kept_share);
        Tile::for_panels(rows, [&](int first, auto count) {
            constexpr int M = decltype(count)::value;
            for (int u = 0; u < seen.unit_count; ++u) {
                Tile::template score_tile<M>(s.query + first * s.steps, s.key + u * UNIT * s.steps, s.steps,
                                             s.score + u * UNIT);
                if (rules.active)
                    rules.template apply<M>(first, block + seen.index[u] * UNIT, s.score + u * UNIT, SCORE_STRIDE,
                                            nullptr);
            }
            for (int m = 0; m < M && first + m < rows; ++m) {
                for (int u = 0; u < seen.unit_count; ++u) {
                    T *weight = s.score + m * SCORE_STRIDE + u * UNIT;
                    const int key = seen.index[u] * UNIT;
                    const uint64_t drawn = rules.drops ? kept[first + m][key / 64] >> (key % 64) : ~uint64_t(0);
                    for (int half = 0; half < 2; ++half) {
                        const V p = R::template exp2<5>(R::load(weight + half * LANES) * factor - row[first + m].lse);
                        R::store(weight + half * LANES,
                                 R::keep_or_zero(p * grow,
                                                 uint32_t(drawn >> (half * LANES) & ((uint64_t(1) << LANES) - 1))));
                    }
                    write(call, item, row[first + m], block + key, bits_of(call, seen, u, first + m, block), weight);
                }
            }
        });
    }

    static void write(const WeightsCall &call, const ForwardItem &item, Row &row, int64_t key, uint64_t bits,
                      const T *weight) {
        Input *line = call.weights ? line_of(call, item, row) : nullptr;
        if (line && bits == Rules<A>::ALL && call.weights_stride[3] == 1) {
            narrow(line + key, R::load(weight));
            narrow(line + key + LANES, R::load(weight + LANES));
            return;
        }
        for (int k = 0; k < UNIT; ++k) {
            if (!(bits >> k & 1)) continue;
            if (line) {
                narrow1(line + (key + k) * call.weights_stride[3], weight[k]);
                continue;
            }
            narrow1(reinterpret_cast<Input *>(call.values) + row.next, weight[k]);
            const int64_t place[] = {item.batch_index, row.head, row.query, key + k};
            for (int axis = 0; axis < 4; ++axis) call.indices[axis * call.indices_stride + row.next] = place[axis];
            ++row.next;
        }
    }

    static size_t scratch_bytes(const WeightsCall &call) {
        return size_t(Scratch(call, nullptr).end - static_cast<char *>(nullptr));
    }
    static constexpr WeightsKernel kernel() { return {scratch_bytes, run}; }
};
