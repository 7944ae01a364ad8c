// Loops over the rows of arrays, a row being their whole last dimension, for operations whose results depend on all of
// it. An operation's entry point says which arrays there are, and its kernels get blocks of rows.
#pragma once

#include <cstdint>

namespace heedful {

// What a kernel gets: rows of each array, with their elements side by side; null for an array that is absent.
template <int N> struct RowBlock {
    char *data[N];
    int64_t step[N]; // from a row to the next, in bytes
    int64_t rows, columns;
};

} // namespace heedful

#if defined(HEEDFUL_TIER)

namespace heedful {
namespace {

template <class T, int N> INLINE T *row_of(const RowBlock<N> &block, int array, int64_t row) {
    return reinterpret_cast<T *>(block.data[array] + row * block.step[array]);
}

INLINE float square_root(float x) { return __builtin_sqrtf(x); }
INLINE double square_root(double x) { return __builtin_sqrt(x); }

// A part's own lanes, with 0 or -inf in the ones behind the end.
template <class V> INLINE V or_zero(Whole, V v) { return v; }
template <class V> INLINE V or_zero(Some part, V v) {
    return Real<__typeof__(v[0] + 0)>::keep_or_zero(v, (1u << part.count) - 1);
}
template <class V> INLINE V or_lowest(Whole, V v) { return v; }
template <class V> INLINE V or_lowest(Some part, V v) {
    return Real<__typeof__(v[0] + 0)>::keep(v, (1u << part.count) - 1);
}

// Real<T>::reduce_add in registers, in the same order; that one goes through memory.
template <class V, int... I> INLINE auto halved(V v, Lanes<I...>) {
    return __builtin_shufflevector(v, v, I...) + __builtin_shufflevector(v, v, (I + int(sizeof...(I)))...);
}
template <class T, class V> INLINE T sum_of_lanes(V v) {
    constexpr int LANES = sizeof(V) / sizeof(T);
    if constexpr (sizeof(V) == 16 && LANES == 4) return (v[0] + v[2]) + (v[1] + v[3]);
    else if constexpr (sizeof(V) == 16) return v[0] + v[1];
    else return sum_of_lanes<T>(halved(v, typename MakeLanes<LANES / 2>::type()));
}

// K sums over n elements at once: add(i, part, terms) gives each one's terms, 0 behind the end. Blocks of 1024 keep the
// rounding of long sums small.
template <class T, int K, class Add> INLINE void sums_of(int64_t n, T (&sums)[K], Add add) {
    typedef typename Real<T>::V V;
    constexpr int LANES = Real<T>::LANES, CHAINS = K == 1 ? 4 : 2;
    constexpr int64_t BLOCK = 1024;
    for (int k = 0; k < K; ++k) sums[k] = 0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        const int64_t end = n - begin < BLOCK ? n : begin + BLOCK;
        V chain[CHAINS][K] = {};
        int64_t i = begin;
        for (; i + CHAINS * LANES <= end; i += CHAINS * LANES)
#pragma GCC unroll 4
            for (int c = 0; c < CHAINS; ++c) {
                V terms[K];
                add(i + c * LANES, Whole(), terms);
                for (int k = 0; k < K; ++k) chain[c][k] += terms[k];
            }
        for (; i + LANES <= end; i += LANES) {
            V terms[K];
            add(i, Whole(), terms);
            for (int k = 0; k < K; ++k) chain[0][k] += terms[k];
        }
        if (i < end) {
            V terms[K];
            add(i, Some{end - i}, terms);
            for (int k = 0; k < K; ++k) chain[1][k] += terms[k];
        }
        for (int k = 0; k < K; ++k) {
            V sum = chain[0][k] + chain[1][k];
            if constexpr (CHAINS == 4) sum += chain[2][k] + chain[3][k];
            sums[k] += sum_of_lanes<T>(sum);
        }
    }
}
template <class T, class Term> INLINE T sum_of(int64_t n, Term term) {
    T sum[1];
    sums_of<T>(n, sum, [=](int64_t i, auto part, typename Real<T>::V(&terms)[1]) { terms[0] = term(i, part); });
    return sum[0];
}

template <class In> void widen_all(const void *from, void *to, int64_t n) {
    typedef typename ComputedIn<In>::type T;
    for_vectors<T>(n, [=](int64_t i, auto part) {
        part.store(static_cast<T *>(to) + i, part.load(static_cast<const In *>(from) + i));
    });
}

} // namespace
} // namespace heedful

#else

#include "loop.h"

namespace heedful {

// Sums over rows are taken in the type that is computed in for so many rows, and in double beyond.
constexpr int64_t SUMMED_ROWS = 64;

template <int N> class Rows {
  public:
    // Arrays of `size` with their strides; one whose data is null is absent. An item has few rows where sums over rows
    // are taken of each.
    Rows(int32_t ndim, const int64_t *size, const Operand (&operands)[N], bool summed = false) {
        std::copy_n(operands, N, operand_);
        columns_ = ndim > 0 ? size[ndim - 1] : 1;
        int32_t order[MAX_DIMS], count = 0;
        for (int32_t dim = 0; dim < ndim - 1; ++dim) {
            rows_ *= size[dim];
            if (size[dim] == 1) continue;
            int32_t at = count++;
            const int64_t *const first = operand_[0].stride;
            for (; at > 0 && std::abs(first[order[at - 1]]) < std::abs(first[dim]); --at) order[at] = order[at - 1];
            order[at] = dim;
        }
        for (int32_t index = 0; index < count; ++index) append(size[order[index]], order[index]);
        if (dims_ == 0) append(1, -1);
        if (rows_ == 0 || columns_ == 0) return;
        for (int i = 0; i < N; ++i) {
            column_step_[i] = operand_[i].data && ndim > 0 && columns_ > 1 ? operand_[i].stride[ndim - 1] : 1;
            buffered_ = buffered_ || column_step_[i] != 1;
        }
        item_rows_ = std::max<int64_t>(ITEM_ELEMENTS / columns_, 1);
        if (summed) item_rows_ = std::min(SUMMED_ROWS, std::max(item_rows_, (rows_ + 63) / 64));
        const int64_t items = even_items(rows_, item_rows_);
        item_rows_ = (rows_ + items - 1) / items;
        items_ = (rows_ + item_rows_ - 1) / item_rows_;
        // Rows of arrays that lie the other way round share cache lines.
        buffer_rows_ = std::max<int64_t>(std::min<int64_t>(ITEM_ELEMENTS / columns_, 16), 1);
    }

    int64_t columns() const { return columns_; }
    int64_t items() const { return items_; }

    // begin(item) before an item's rows, then body(block, item, scratch) for them in order, whatever the threads; each
    // thread has its own scratch of so many bytes.
    template <class Begin, class Body>
    void run(const heedful_threads *threads, size_t scratch_bytes, Begin begin, Body body) const {
        if (items_ == 0) return;
        const size_t own = (scratch_bytes + 63) / 64 * 64;
        share_out(threads, items_, [&](auto claim) {
            const ScratchBlock scratch(std::max<size_t>(own + (buffered_ ? N * buffer_bytes() : 0), 64));
            for (int64_t item = claim(); item >= 0; item = claim()) {
                begin(item);
                run_item(item, scratch.data() + own,
                         [&](const RowBlock<N> &block) { body(block, item, scratch.data()); });
            }
        });
    }
    template <class Body> void run(const heedful_threads *threads, size_t scratch_bytes, Body body) const {
        run(threads, scratch_bytes, [](int64_t) {}, body);
    }

  private:
    void append(int64_t size, int32_t dim) {
        bool merges = dims_ > 0;
        for (int i = 0; merges && i < N; ++i) merges = stride_[dims_ - 1][i] == size * stride(i, dim);
        if (merges) size_[dims_ - 1] *= size;
        else size_[dims_++] = size;
        for (int i = 0; i < N; ++i) stride_[dims_ - 1][i] = stride(i, dim);
    }
    int64_t stride(int array, int32_t dim) const {
        return operand_[array].data && dim >= 0 ? operand_[array].stride[dim] : 0;
    }
    size_t buffer_bytes() const { return size_t(buffer_rows_ * columns_ * 8 + 63) / 64 * 64; }

    template <class Body> void run_item(int64_t item, char *buffers, Body body) const {
        const int64_t first = item * item_rows_, inner = dims_ - 1;
        int64_t left = std::min(item_rows_, rows_ - first), index[MAX_DIMS], rest = first;
        RowBlock<N> block;
        block.columns = columns_;
        for (int i = 0; i < N; ++i) {
            block.data[i] = static_cast<char *>(operand_[i].data);
            block.step[i] = stride_[inner][i] * operand_[i].bytes;
        }
        for (int64_t dim = inner; dim >= 0; --dim) {
            index[dim] = rest % size_[dim];
            rest /= size_[dim];
            move(block, dim, index[dim]);
        }
        for (;;) {
            block.rows = std::min(left, size_[inner] - index[inner]);
            if (buffered_) block.rows = std::min(block.rows, buffer_rows_);
            if (buffered_) through_buffers(block, buffers, body);
            else body(block);
            left -= block.rows;
            if (left == 0) return;
            index[inner] += block.rows;
            move(block, inner, block.rows);
            for (int64_t dim = inner; dim > 0 && index[dim] == size_[dim]; --dim) {
                index[dim] = 0;
                ++index[dim - 1];
                move(block, dim, -size_[dim]);
                move(block, dim - 1, 1);
            }
        }
    }
    void move(RowBlock<N> &block, int64_t dim, int64_t count) const {
        for (int i = 0; i < N; ++i)
            if (operand_[i].data) block.data[i] += count * stride_[dim][i] * operand_[i].bytes;
    }

    template <class Body> void through_buffers(const RowBlock<N> &rows, char *buffers, Body body) const {
        RowBlock<N> block = rows;
        for (int i = 0; i < N; ++i) {
            if (column_step_[i] == 1) continue;
            block.data[i] = buffers + size_t(i) * buffer_bytes();
            block.step[i] = columns_ * operand_[i].bytes;
            if (operand_[i].role != WRITTEN) copy<false>(block.data[i], rows.data[i], rows, i);
        }
        body(block);
        for (int i = 0; i < N; ++i)
            if (column_step_[i] != 1 && operand_[i].role == WRITTEN) copy<true>(block.data[i], rows.data[i], rows, i);
    }

    template <bool OUT> void copy(char *buffer, char *at, const RowBlock<N> &rows, int array) const {
        const int64_t bytes = operand_[array].bytes, step = rows.step[array] / bytes;
        switch (bytes) {
        case 1:
            return copy_as<OUT, uint8_t>(buffer, at, step, rows.rows, array);
        case 2:
            return copy_as<OUT, uint16_t>(buffer, at, step, rows.rows, array);
        case 4:
            return copy_as<OUT, uint32_t>(buffer, at, step, rows.rows, array);
        default:
            return copy_as<OUT, uint64_t>(buffer, at, step, rows.rows, array);
        }
    }
    template <bool OUT, class Word>
    void copy_as(char *buffer, char *at, int64_t row_step, int64_t rows, int array) const {
        const int64_t column_step = column_step_[array];
        const auto one = [&](int64_t row, int64_t column) {
            Word &inside = reinterpret_cast<Word *>(buffer)[row * columns_ + column];
            Word &outside = reinterpret_cast<Word *>(at)[row * row_step + column * column_step];
            if constexpr (OUT) outside = inside;
            else inside = outside;
        };
        if (std::abs(row_step) < std::abs(column_step)) {
            for (int64_t column = 0; column < columns_; ++column)
                for (int64_t row = 0; row < rows; ++row) one(row, column);
        } else {
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t column = 0; column < columns_; ++column) one(row, column);
        }
    }

    Operand operand_[N];
    int64_t size_[MAX_DIMS], stride_[MAX_DIMS][N], column_step_[N];
    int dims_ = 0;
    bool buffered_ = false;
    int64_t rows_ = 1, columns_ = 1, item_rows_ = 0, items_ = 0, buffer_rows_ = 1;
};

// Numbers in the type that is computed in, one for each column: those of an array, where need be widened, or all the
// same where it is absent.
class Columns {
  public:
    typedef void (*Widen)(const void *from, void *to, int64_t n);

    // widen: by heedful_dtype.
    Columns(const char *name, const heedful_array *given, double otherwise, const heedful_array &x,
            const Widen (&widen)[4]) {
        const int64_t count = x.ndim > 0 ? x.size[x.ndim - 1] : 1, bytes = element_bytes(computed_dtype(x.dtype));
        if (!given || !given->data) {
            own_.resize(size_t(count));
            for (int64_t i = 0; i < count; ++i) {
                if (bytes == 8) own_[size_t(i)] = otherwise;
                else reinterpret_cast<float *>(own_.data())[i] = float(otherwise);
            }
            return;
        }
        check_array(name, *given);
        REQUIRE(given->ndim == 1 && given->size[0] == count,
                std::string(name) + ": takes one dimension of " + std::to_string(count) + " elements");
        REQUIRE(given->dtype == x.dtype || given->dtype == computed_dtype(x.dtype),
                std::string(name) + ": has dtype code " + std::to_string(given->dtype) + ", takes x's or " +
                    std::to_string(computed_dtype(x.dtype)));
        const int64_t step = given->stride[0], from_bytes = element_bytes(given->dtype);
        if (given->dtype == computed_dtype(x.dtype) && (step == 1 || count == 1)) {
            data_ = given->data;
            return;
        }
        own_.resize(size_t(count));
        const char *const from = static_cast<const char *>(given->data);
        char *const to = reinterpret_cast<char *>(own_.data());
        if (step == 1) widen[given->dtype](from, to, count);
        else
            for (int64_t i = 0; i < count; ++i) widen[given->dtype](from + i * step * from_bytes, to + i * bytes, 1);
    }
    const void *data() const { return data_ ? data_ : own_.data(); }

  private:
    const void *data_ = nullptr;
    std::vector<double> own_; // room for as many numbers of either type
};

// Sums of each column over all rows, of items first: an item's `count` numbers in the type that is computed in.
class ColumnSums {
  public:
    ColumnSums(int64_t items, int64_t count, int32_t dtype)
        : items_(items), count_(count), dtype_(computed_dtype(dtype)),
          block_(size_t(std::max<int64_t>(items * count, 1)) * size_t(element_bytes(dtype_))) {}

    void *of(int64_t item) const { return block_.data() + item * count_ * element_bytes(dtype_); }
    void clear(int64_t item) const { std::memset(of(item), 0, size_t(count_ * element_bytes(dtype_))); }

    // Writes the sums of `columns` columns from the one at `first` on, added up in order.
    void add_up(const heedful_threads *threads, int64_t first, int64_t columns, void *to) const {
        if (dtype_ == HEEDFUL_FLOAT64) add_up_as<double>(threads, first, columns, static_cast<double *>(to));
        else add_up_as<float>(threads, first, columns, static_cast<float *>(to));
    }

  private:
    template <class T> void add_up_as(const heedful_threads *threads, int64_t first, int64_t columns, T *to) const {
        constexpr int64_t CHUNK = 256;
        const T *const parts = reinterpret_cast<const T *>(block_.data()) + first;
        const int64_t chunks = (columns + CHUNK - 1) / CHUNK;
        share_out(items_ * columns < ITEM_ELEMENTS ? nullptr : threads, chunks, [&](auto claim) {
            for (int64_t chunk = claim(); chunk >= 0; chunk = claim()) {
                const int64_t begin = chunk * CHUNK, n = std::min(CHUNK, columns - begin);
                double sums[CHUNK] = {};
                for (int64_t item = 0; item < items_; ++item)
                    for (int64_t i = 0; i < n; ++i) sums[i] += double(parts[item * count_ + begin + i]);
                for (int64_t i = 0; i < n; ++i) to[begin + i] = T(sums[i]);
            }
        });
    }

    int64_t items_, count_;
    int32_t dtype_;
    ScratchBlock block_;
};

} // namespace heedful

#endif
