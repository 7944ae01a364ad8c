// Operands brought into the order that the tiles read: words across, so that one load serves a step.
// Included by each tier's source, inside its anonymous namespace, after tiles.h.

template <class A> struct Pack {
    typedef typename A::Input Input;
    typedef typename A::Number T;
    typedef typename A::Word Word;
    typedef typename A::Weight Weight;
    typedef Real<T> R;
    typedef typename R::V V;
    typedef Words<Word> W;
    typedef Tiles<A> Tile;
    static constexpr int LANES = Tile::LANES, UNIT = Tile::UNIT;

    // The keys or values of one head.
    struct Matrix {
        const Input *data;
        const int32_t *page; // of the batch item; null for none
        int64_t row_stride, column_stride, length, width, block_stride, page_stride, page_size, blocks;

        Matrix(const char *tensor, const int64_t *stride, const Inputs &call, int64_t batch_index, int64_t kv_head,
               int64_t width)
            : data(reinterpret_cast<const Input *>(tensor) + kv_head * stride[1]), page(nullptr), row_stride(stride[2]),
              column_stride(stride[3]), length(call.k_length), width(width), block_stride(stride[0]),
              page_stride(call.pages.stride), page_size(call.pages.size), blocks(call.pages.blocks) {
            if (call.pages.table) page = call.pages.table + batch_index * call.pages.batch_stride;
            else data += batch_index * block_stride;
        }

        // Where rows [first, first + count) lie; null past the last. A page that is in no block, because no pair
        // reaches it, is read as the pool's first row: its keys are masked as any others beside it.
        INLINE void rows(int64_t first, int count, const Input **row) const {
            int64_t left = length - first;
            left = left < 0 ? 0 : left < count ? left : count;
            int r = 0;
            if (!page) {
                for (const Input *at = data + first * row_stride; r < left; ++r, at += row_stride) row[r] = at;
            } else {
                while (r < left) {
                    const int64_t key = first + r, number = key / page_size, within = key - number * page_size;
                    const int64_t block = page[number * page_stride];
                    const bool exists = block >= 0 && block < blocks;
                    const Input *at = exists ? data + block * block_stride + within * row_stride : data;
                    const int64_t step = exists ? row_stride : 0;
                    int64_t run = page_size - within;
                    for (run = run < left - r ? run : left - r; run > 0; --run, at += step) row[r++] = at;
                }
            }
            for (; r < count; ++r) row[r] = nullptr;
        }
    };

    // Words of one row: whole vectors while they last, then one word at a time.
    static INLINE Word word_at(const Input *row, int64_t stride, int64_t step, int64_t length) {
        const Input first = row[step * A::PER_WORD * stride];
        if (A::PER_WORD == 1) return A::word(first, first);
        const bool both = step * A::PER_WORD + 1 < length;
        return A::word(first, both ? row[(step * A::PER_WORD + 1) * stride] : Input{});
    }

    // Rows of words become columns: target[step * target_stride + r] = word `step` of row r, for `count`
    // rows (at most LANES), zero for null rows and the rest of LANES. Ascending steps: what one step writes past its
    // own columns the next overwrites.
    static void columns(const Input *const *row, int count, int64_t stride, int64_t length, int64_t steps, Word *target,
                        int64_t target_stride, bool negate) {
        int64_t step = 0;
        if (count == 0) {
            for (; step < steps; ++step) W::store(target + step * target_stride, typename W::V{});
            return;
        }
        if (stride == 1) {
            for (; (step + LANES) * A::PER_WORD <= length; step += LANES) {
                typename W::V square[LANES];
#pragma GCC unroll 16
                for (int r = 0; r < LANES; ++r)
                    square[r] = r < count && row[r] ? A::words(row[r] + step * A::PER_WORD) : typename W::V{};
                W::transpose(square);
#pragma GCC unroll 16
                for (int s = 0; s < LANES; ++s) W::store(target + (step + s) * target_stride, square[s]);
            }
        }
        for (; step < steps; ++step)
            for (int r = 0; r < LANES; ++r)
                target[step * target_stride + r] =
                    r < count && row[r] ? word_at(row[r], stride, step, length) : A::zero();
        if (negate)
            for (step = 0; step < steps; ++step)
                for (int r = 0; r < count; ++r)
                    target[step * target_stride + r] = A::negate(target[step * target_stride + r]);
    }

    // Rows become panels: target[(r / PANEL) * steps * PANEL + step * PANEL + r % PANEL]. In ascending order, because
    // what a panel's last step writes past its own rows belongs to the next panel.
    static void panels(const Input *const *row, int64_t rows, int64_t stride, int64_t length, int64_t steps,
                       Word *target, bool negate) {
        for (int64_t first = 0; first < rows; first += PANEL, target += PANEL * steps) {
            // The last part first: what it writes past the panel falls into the next step's first rows.
            for (int part = (PANEL - 1) / LANES * LANES; part >= 0; part -= LANES) {
                int64_t left = rows - first - part;
                left = left < 0 ? 0 : left < PANEL - part ? left : PANEL - part;
                columns(row + (left ? first + part : 0), int(left < LANES ? left : LANES), stride, length, steps,
                        target + part, PANEL, negate);
            }
        }
    }

    // Half of the next unit's rows, which the next pack will want; addresses past the end are harmless.
    static INLINE void prefetch_rows(const Input *row, int64_t stride, int64_t width) {
        for (int r = 0; r < LANES; ++r, row += stride)
            for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(Input))) __builtin_prefetch(row + d, 0, 2);
    }

    // Columns of one unit of rows: target[step * UNIT + row]; zero past the last.
    static NOINLINE void keys(const Matrix &keys, int64_t first_key, int64_t steps, Word *target) {
        const Input *row[UNIT];
        keys.rows(first_key, UNIT, row);
        for (int half = 0; half < 2; ++half, target += LANES) {
            const Input *const *from = row + half * LANES;
            int count = 0;
            while (count < LANES && from[count]) ++count;
            if (count > 0) prefetch_rows(from[0] + UNIT * keys.row_stride, keys.row_stride, keys.width);
            columns(from, count, keys.column_stride, keys.width, steps, target, UNIT, false);
        }
    }

    // Copies `count` rows that lie anywhere (null: zero) to target[row / PER_WORD][column], zero past the last
    // column; says whether all of them are finite.
    static INLINE bool copy_rows(const Input *const *row, int count, int64_t stride, int64_t width, Word *target,
                                 int64_t target_stride) {
        V suspect = {}; // NaN as soon as a value is not finite: x * 0 is
        for (int k = 0; k < count; k += A::PER_WORD, target += target_stride) {
            const Input *first_row = row[k], *next = A::PER_WORD == 2 && k + 1 < count ? row[k + 1] : nullptr;
            if (!first_row && !next) {
                for (int64_t d = 0; d < target_stride; ++d) target[d] = A::zero();
                continue;
            }
            int64_t d = 0;
            if (stride == 1) {
                for (; d + LANES <= width; d += LANES) {
                    const V first = first_row ? widen(first_row + d) : V{};
                    suspect += first * R::set1(0);
                    if constexpr (A::PER_WORD == 1) {
                        W::store(target + d, first);
                    } else {
                        typedef typename W::V Bits;
                        const V second = next ? widen(next + d) : V{};
                        suspect += second * R::set1(0);
                        W::store(target + d, (Bits)first >> 16 | (Bits)second);
                    }
                }
            }
            for (; d < width; ++d) {
                const Input first = first_row ? first_row[d * stride] : Input{},
                            second = next ? next[d * stride] : Input{};
                target[d] = A::word(first, second);
                suspect[0] += widen1(first) * 0 + (A::PER_WORD == 2 ? widen1(second) * 0 : 0);
            }
            for (; d < target_stride; ++d) target[d] = A::zero();
        }
        return R::reduce_add(suspect) == 0;
    }

    // One unit of values; says whether all of them are finite.
    static NOINLINE bool values(const Matrix &values, int64_t first_key, Word *target, int64_t value_stride) {
        const Input *row[UNIT];
        values.rows(first_key, UNIT, row);
        for (int half = 0; half < 2; ++half)
            if (row[half * LANES])
                prefetch_rows(row[half * LANES] + UNIT * values.row_stride, values.row_stride, values.width);
        return copy_rows(row, UNIT, values.column_stride, values.width, target, value_stride);
    }

    // A copy of a unit's values in which the keys that no row of the tile uses are zero: a weight of zero
    // does not silence a NaN.
    static NOINLINE void clean(const Word *source, const uint64_t *used, int unit_index, int64_t value_stride,
                               Word *target) {
        for (int k = 0; k < UNIT; k += A::PER_WORD, source += value_stride, target += value_stride) {
            const int key = unit_index * UNIT + k;
            const bool first = used[key / 64] >> (key % 64) & 1, second = used[(key + 1) / 64] >> ((key + 1) % 64) & 1;
            for (int64_t d = 0; d < value_stride; ++d) {
                if constexpr (A::PER_WORD == 1) target[d] = first ? source[d] : A::zero();
                else target[d] = source[d] & ((first ? 0xffffu : 0) | (second ? 0xffff0000u : 0));
            }
        }
    }
};
