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
        Word *query, *key; // panels of an item's rows; units of a block
        T *score;          // [PANEL][SCORE_STRIDE]
        char *end;

        Scratch(const WeightsCall &call, char *memory) {
            steps = (call.head_dim + A::PER_WORD - 1) / A::PER_WORD;
            end = memory;
            query = take<Word>(WEIGHT_ROWS * steps + LANES);
            key = take<Word>(KEY_BLOCK * steps);
            score = take<T>(PANEL * SCORE_STRIDE);
        }
        template <class U> U *take(int64_t count) {
            U *begin = reinterpret_cast<U *>(end);
            end += round_up(count * int64_t(sizeof(U)), 64);
            return begin;
        }
    };

    // What is known of a row.
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

    // Keys are packed once for all rows of the item.
    static void run(const WeightsCall &call, const ForwardItem &item, char *memory) {
        const Scratch s(call, memory);
        const typename Packing::Matrix keys(call.key, call.key_stride, call, item.batch_index, item.kv_head,
                                            call.head_dim);
        Rules<A> rules(call, item.batch_index);
        rules.magnitude = T(call.scale);
        const int64_t q_begin = item.first_row / call.group, q_end = (item.first_row + item.rows - 1) / call.group + 1;
        const AtomSelection selection(*call.schedule, item.batch_index, q_begin, q_end);
        int64_t low, high;
        selection.hull(q_begin, q_end, low, high);
        low = low < high ? low / KEY_BLOCK * KEY_BLOCK : 0;
        high = low < high ? round_up(high, KEY_BLOCK) : 0;
        Row row[WEIGHT_ROWS];
        for (int64_t first = 0; first < item.rows; first += MAX_TILE_ROWS) begin_rows(call, item, s, first, row);
        if (call.weights) {
            clear(call, item, row, item.rows, 0, low);
            clear(call, item, row, item.rows, high, call.k_length);
        }
        Expansion seen;
        for (int64_t block = low; block < high; block += KEY_BLOCK) {
            bool packed[UNITS] = {};
            for (int64_t first = 0; first < item.rows; first += MAX_TILE_ROWS) {
                const int rows = rows_of_tile(item, first);
                selection.expand(item.kv_head * call.group, call.group, item.first_row + first, rows, block, KEY_BLOCK,
                                 UNIT, seen);
                if (rules.active || rules.drops) {
                    rules.place(item.kv_head, item.first_row + first, rows);
                    rules.exclude(block, seen);
                }
                if (call.weights && !is_whole(seen)) clear(call, item, row + first, rows, block, block + KEY_BLOCK);
                for (int u = 0; u < seen.unit_count && !call.counts; ++u) {
                    const int unit = seen.index[u];
                    if (!packed[unit]) Packing::keys(keys, block + unit * UNIT, s.steps, s.key + unit * UNIT * s.steps);
                    packed[unit] = true;
                }
                if (seen.unit_count) visit(call, item, s, rules, first, block, seen, rows, row + first);
            }
        }
        if (call.counts)
            for (int64_t r = 0; r < item.rows; ++r) call.counts[row[r].at] = row[r].next;
    }

    static int rows_of_tile(const ForwardItem &item, int64_t first) {
        return int(item.rows - first < MAX_TILE_ROWS ? item.rows - first : MAX_TILE_ROWS);
    }

    // Whether every pair of the block counts.
    static bool is_whole(const Expansion &seen) {
        bool whole = seen.unit_count == UNITS;
        for (int u = 0; whole && u < UNITS; ++u) whole = !seen.partial[u];
        return whole;
    }

    static void begin_rows(const WeightsCall &call, const ForwardItem &item, const Scratch &s, int64_t first,
                           Row *row) {
        const Input *query[MAX_TILE_ROWS];
        const int rows = rows_of_tile(item, first);
        for (int r = 0; r < rows; ++r) {
            const int64_t index = item.first_row + first + r;
            Row &here = row[first + r];
            here.query = index / call.group;
            here.head = item.kv_head * call.group + index % call.group;
            here.at = call.statistic(item.batch_index, here.head, here.query);
            here.next = call.row_begin ? call.row_begin[here.at] : 0;
            const T lse = call.lse ? static_cast<const T *>(call.lse)[here.at] : 0;
            // Scores of -inf alone: +inf makes them weights of 0.
            here.lse = lse == -T(__builtin_inff()) ? -lse : lse * T(LOG2_E);
            query[r] = reinterpret_cast<const Input *>(call.query) + item.batch_index * call.query_stride[0] +
                       here.head * call.query_stride[1] + here.query * call.query_stride[2];
        }
        Packing::panels(query, rows, call.query_stride[3], call.head_dim, s.steps, s.query + first * s.steps, false);
    }

    // Zeroes keys [from, to) of some rows.
    static void clear(const WeightsCall &call, const ForwardItem &item, const Row *row, int64_t rows, int64_t from,
                      int64_t to) {
        to = to < call.k_length ? to : call.k_length;
        if (from >= to) return;
        for (int64_t r = 0; r < rows; ++r) {
            Input *line = line_of(call, item, row[r]);
            if (call.weights_stride[3] == 1) __builtin_memset(line + from, 0, size_t(to - from) * sizeof(Input));
            else
                for (int64_t k = from; k < to; ++k) line[k * call.weights_stride[3]] = Input{};
        }
    }

    static Input *line_of(const WeightsCall &call, const ForwardItem &item, const Row &row) {
        return reinterpret_cast<Input *>(call.weights) + item.batch_index * call.weights_stride[0] +
               row.head * call.weights_stride[1] + row.query * call.weights_stride[2];
    }

    // One tile of rows, which begins at row `tile` of the item, against the listed units of one key block.
    static void visit(const WeightsCall &call, const ForwardItem &item, const Scratch &s, const Rules<A> &rules,
                      int64_t tile, int64_t block, const Expansion &seen, int rows, Row *row) {
        if (call.counts) {
            for (int r = 0; r < rows; ++r)
                for (int u = 0; u < seen.unit_count; ++u) row[r].next += count_bits(bits_of(call, seen, u, r, block));
            return;
        }
        uint64_t kept[MAX_TILE_ROWS][BLOCK_WORDS];
        if (rules.drops) rules.draw(block, seen, kept);
        const T factor = rules.factor(), grow = T(1 / call.features.kept_share);
        const bool side_by_side = call.weights && call.weights_stride[3] == 1;
        Tile::for_panels(rows, [&](int first, auto count) {
            constexpr int M = decltype(count)::value;
            for (int u = 0; u < seen.unit_count; ++u) {
                Tile::template score_tile<M>(s.query + (tile + first) * s.steps, s.key + seen.index[u] * UNIT * s.steps,
                                             s.steps, s.score + u * UNIT);
                if (rules.active)
                    rules.template apply<M>(first, block + seen.index[u] * UNIT, s.score + u * UNIT, SCORE_STRIDE,
                                            nullptr);
            }
            for (int m = 0; m < M && first + m < rows; ++m) {
                const V scale = R::set1(factor), offset = R::set1(-row[first + m].lse);
                Input *const line = call.weights ? line_of(call, item, row[first + m]) : nullptr;
                for (int u = 0; u < seen.unit_count; ++u) {
                    T *score = s.score + m * SCORE_STRIDE + u * UNIT;
                    V weight[2];
                    for (int half = 0; half < 2; ++half)
                        weight[half] = R::template exp2<5>(R::load(score + half * LANES) * scale + offset);
                    const int key = seen.index[u] * UNIT;
                    if (rules.drops) {
                        const uint64_t drawn = kept[first + m][key / 64] >> (key % 64);
                        for (int half = 0; half < 2; ++half)
                            weight[half] = R::keep_or_zero(
                                weight[half] * grow, uint32_t(drawn >> (half * LANES) & ((uint64_t(1) << LANES) - 1)));
                    }
                    const uint64_t bits = bits_of(call, seen, u, first + m, block);
                    for (int half = 0; half < 2; ++half) {
                        if (side_by_side && bits == Rules<A>::ALL)
                            narrow(line + block + key + half * LANES, weight[half]);
                        else R::store(score + half * LANES, weight[half]);
                    }
                    if (!side_by_side || bits != Rules<A>::ALL)
                        write(call, item, row[first + m], line, block + key, bits, score);
                }
            }
        });
    }

    // One by one.
    static void write(const WeightsCall &call, const ForwardItem &item, Row &row, Input *line, int64_t key,
                      uint64_t bits, const T *weight) {
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
