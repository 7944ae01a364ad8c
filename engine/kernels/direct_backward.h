// The backward of a panel of rows or fewer, keys and values read where they lie: to pack a block of keys takes longer
// than all that so few rows do with it, and every gradient of a key is made at once and written to its place. Included
// by each tier's source, inside its anonymous namespace, after backward.h.

template <class A> struct DirectBackward {
    typedef Backward<A> Base;
    typedef Direct<A> InPlace;
    typedef typename Base::Input Input;
    typedef typename Base::T T;
    typedef typename Base::Word Word;
    typedef typename Base::R R;
    typedef typename Base::V V;
    typedef typename Base::W W;
    typedef typename Base::Packing Packing;
    typedef typename Base::View View;
    static constexpr int LANES = Base::LANES, UNIT = Base::UNIT, SCORE_STRIDE = Base::SCORE_STRIDE;

    // More rows are faster with packed keys.
    static constexpr int64_t MAX_ROWS = PANEL < 8 ? PANEL : 8;

    static bool serves(const BackwardCall &call) {
        return call.rows() <= MAX_ROWS && call.key_stride[3] == 1 && call.value_stride[3] == 1 && !call.pages.table &&
               call.grad_key_stride[3] == 1 && call.grad_value_stride[3] == 1;
    }

    // Rows of words and numbers as the products in place want them.
    struct Rows {
        Word *query, *grad; // [rows][InPlace::query_stride]
        T *sum;             // [rows][sum_stride], dS key of this block
        Input *nothing;     // a row of zeros
        int64_t rows, query_stride, grad_stride, sum_stride, width;
        char *end;

        Rows(const BackwardCall &call, char *memory) {
            rows = round_up(call.rows(), 4);
            query_stride = InPlace::query_stride(call.head_dim);
            grad_stride = InPlace::query_stride(call.value_dim);
            sum_stride = round_up(call.head_dim, UNIT);
            width = call.head_dim > call.value_dim ? call.head_dim : call.value_dim;
            end = memory;
            query = take<Word>(rows * query_stride);
            grad = take<Word>(rows * grad_stride);
            sum = take<T>(rows * sum_stride);
            nothing = take<Input>(width);
        }

        template <class U> U *take(int64_t count) {
            U *begin = reinterpret_cast<U *>(end);
            end += round_up(count * int64_t(sizeof(U)), 64);
            return begin;
        }
        size_t bytes() const { return size_t(end - reinterpret_cast<char *>(query)); }
    };

    static void copy_row(const Input *row, int64_t stride, int64_t length, Word *target) {
        int64_t step = 0;
        if (stride == 1)
            for (; (step + LANES) * A::PER_WORD <= length; step += LANES)
                W::store(target + step, A::words(row + step * A::PER_WORD));
        for (; step * A::PER_WORD < length; ++step) target[step] = Packing::word_at(row, stride, step, length);
    }

    // As Base::pack_tile: a row that sees no key of the block, or has no weights at all, is zeros.
    static void take_rows(const BackwardCall &call, const BackwardItem &item, const typename Base::Scratch &s,
                          const Rows &own, const Expansion &seen, int rows) {
        const Input *query[MAX_ROWS] = {}, *grad[MAX_ROWS] = {};
        const T *lse = Base::row_lse(call, item.batch_index * call.kv_heads + item.kv_head);
        __builtin_memset(own.query, 0, own.bytes());
        for (int r = 0; r < rows; ++r) {
            uint64_t any = 0;
            for (int u = 0; u < seen.unit_count; ++u) any |= !seen.partial[u];
            for (int word = 0; word < BLOCK_WORDS && !any; ++word) any |= seen.row[r][word];
            if (!any || lse[r] == T(__builtin_inff())) continue;
            query[r] = Base::row_of(reinterpret_cast<const Input *>(call.query), call.query_stride, call,
                                    item.batch_index, item.kv_head, r);
            grad[r] = Base::row_of(reinterpret_cast<const Input *>(call.grad_out), call.grad_out_stride, call,
                                   item.batch_index, item.kv_head, r);
            copy_row(query[r], call.query_stride[3], call.head_dim, own.query + r * own.query_stride);
            copy_row(grad[r], call.grad_out_stride[3], call.value_dim, own.grad + r * own.grad_stride);
        }
        Packing::copy_rows(query, rows, call.query_stride[3], call.head_dim, s.query_rows, s.key_stride);
        Packing::copy_rows(grad, rows, call.grad_out_stride[3], call.value_dim, s.grad_rows, s.value_stride);
    }

    // Weights and slopes of all rows against one unit, whose first `count` keys and values, whole vectors of them, lie
    // at `key` and `value`.
    static void weigh(const BackwardCall &call, const BackwardItem &item, const typename Base::Scratch &s,
                      const Rows &own, const View &view, int u, int count, const Input *const *key,
                      const Input *const *value) {
        const int unit = view.seen.index[u];
        T *score = s.score, *grad_weight = s.grad_weight;
        if constexpr (!Base::PAIRED) {
            score = s.weight + unit * UNIT;
            grad_weight = s.slope + unit * UNIT;
        }
        const typename InPlace::Ahead none = {};
        InPlace::scores(own.query, own.query_stride, view.rows, key, none, count, call.head_dim, score);
        InPlace::scores(own.grad, own.grad_stride, view.rows, value, none, count, call.value_dim, grad_weight);
        Base::for_rows(view.rows, [&](int first, auto panel) {
            constexpr int M = decltype(panel)::value;
            // What memory held of keys past the last and of a panel's rows beyond these could be NaN.
            for (int r = 0; r < M; ++r) {
                const int from = r < view.rows ? count : 0;
                for (int k = from; k < UNIT; k += LANES) {
                    R::store(score + r * SCORE_STRIDE + k, V{});
                    R::store(grad_weight + r * SCORE_STRIDE + k, V{});
                }
            }
            Base::template weigh<M>(call, item, s, view, first, 0, u, score, grad_weight);
        });
    }

    // grad[key] = factor * weight^T rows for one unit, in its place. Keys that no row sees get 0.
    static void write(const Word *weight, const Word *rows, int64_t stride, int words, uint64_t used, int keys,
                      T factor, int64_t width, Input *grad, int64_t grad_stride) {
        const V by = R::set1(factor);
        for (int k = 0; k < keys; ++k, ++weight, grad += grad_stride) {
            if (!(used >> k & 1)) {
                __builtin_memset(grad, 0, size_t(width) * sizeof(Input));
                continue;
            }
            const auto at = [&](int64_t column) {
                V sum = {};
                for (int word = 0; word < words; ++word)
                    sum = A::madd(sum, weight[word * SCORE_STRIDE], W::load(rows + word * stride + column));
                return sum * by;
            };
            int64_t column = 0;
            for (; column + LANES <= width; column += LANES) narrow(grad + column, at(column));
            if (column == width) continue;
            const V last = at(column);
            for (int lane = 0; column < width; ++column, ++lane) narrow1(grad + column, last[lane]);
        }
    }

    static void run(const BackwardCall &call, const BackwardItem &item, char *memory) {
        const typename Base::Scratch s(call, memory);
        const Rows own(call, s.end);
        const int rows = int(call.rows());
        const typename Packing::Matrix keys(call.key, call.key_stride, call, item.batch_index, item.kv_head,
                                            call.head_dim);
        const typename Packing::Matrix values(call.value, call.value_stride, call, item.batch_index, item.kv_head,
                                              call.value_dim);
        Rules<A> rules(call, item.batch_index);
        rules.magnitude = T(call.scale); // with its sign: no maximum is taken here
        Expansion seen;
        uint64_t kept[MAX_TILE_ROWS][BLOCK_WORDS];
        AtomSelection(*call.schedule, item.batch_index, 0, call.q_length)
            .expand(item.kv_head * call.group, call.group, 0, rows, item.first_key, item.keys, UNIT, seen);
        if (seen.unit_count && (rules.active || rules.drops || call.grad_weights)) {
            rules.place(item.kv_head, 0, rows);
            rules.exclude(item.first_key, seen);
            if (rules.drops) rules.draw(item.first_key, seen, kept);
        }
        if (seen.unit_count) take_rows(call, item, s, own, seen, rows);
        if (call.grad_slopes) __builtin_memset(s.slope_sum, 0, size_t(rows) * sizeof(T));
        const int64_t pair = item.batch_index * call.kv_heads + item.kv_head;
        const View view = {rules,
                           seen,
                           rules.drops ? kept : nullptr,
                           Base::row_lse(call, pair),
                           Base::row_delta(call, pair),
                           rules.factor(),
                           T(1 / call.features.kept_share),
                           item.first_key,
                           rows};
        alignas(64) T one[MAX_ROWS + 4];
        for (T &x : one) x = 1;
        const int words = (rows + A::PER_WORD - 1) / A::PER_WORD;
        for (int unit = 0, u = 0; unit * UNIT < item.keys; ++unit) {
            const int64_t first = item.first_key + unit * UNIT, left = call.k_length - first;
            const int here = left < UNIT ? int(left) : UNIT;
            uint64_t used = 0;
            if (u < seen.unit_count && seen.index[u] == unit) {
                used =
                    seen.partial[u] ? seen.used[unit * UNIT / 64] >> (unit * UNIT % 64) & Rules<A>::ALL : Rules<A>::ALL;
                const Input *key[UNIT], *value[UNIT];
                keys.rows(first, UNIT, key);
                values.rows(first, UNIT, value);
                // A weight of zero does not silence a NaN.
                for (int k = 0; k < UNIT; ++k)
                    if (!(used >> k & 1)) key[k] = value[k] = own.nothing;
                const int count = here > LANES ? UNIT : LANES;
                weigh(call, item, s, own, view, u, count, key, value);
                InPlace::values(s.slope_rows + unit * UNIT, rows, key, typename InPlace::Ahead{}, count, call.head_dim,
                                own.sum, own.sum_stride, one);
                ++u;
            }
            write(s.slope + unit * UNIT, s.query_rows, s.key_stride, words, used, here, T(call.scale), call.head_dim,
                  row_at(call.grad_key, call.grad_key_stride, item, first), call.grad_key_stride[2]);
            write(s.weight + unit * UNIT, s.grad_rows, s.value_stride, words, used, here, T(1), call.value_dim,
                  row_at(call.grad_value, call.grad_value_stride, item, first), call.grad_value_stride[2]);
        }
        if (seen.unit_count == 0) return;
        item.wait(item.order, 0);
        T *sum = Base::sum_of(call, item.batch_index, item.kv_head);
        for (int r = 0; r < rows; ++r)
            for (int64_t column = 0; column < s.key_stride; column += LANES) {
                T *at = sum + r * call.sum_stride[2] + column;
                R::store(at, R::load(at) + R::load(own.sum + r * own.sum_stride + column));
            }
        if (call.grad_slopes) Base::add_slopes(call, item, s, 0, 0, rows);
    }

    static Input *row_at(char *tensor, const int64_t *stride, const BackwardItem &item, int64_t key) {
        return reinterpret_cast<Input *>(tensor) + item.batch_index * stride[0] + item.kv_head * stride[1] +
               key * stride[2];
    }
};
