// Loops over arrays of one shape and any strides, shared out to threads. An operation's entry point says which arrays
// there are and gets runs of elements that lie side by side.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../error.h"
#include "../scratch.h"
#include "../workers.h"
#include "heedful_ops/array.h"

namespace heedful {

constexpr int MAX_DIMS = 32;
// Elements of a work item: 4 to 16 microseconds of the lightest operations, against 1 for starting threads.
constexpr int64_t ITEM_ELEMENTS = 32768;
// Into how many items `total` falls at so many an item: an even number, so that two threads end together.
inline int64_t even_items(int64_t total, int64_t item) {
    const int64_t count = (total + item - 1) / item;
    return count + (count > 1 ? count % 2 : 0);
}
// Arrays whose elements do not lie side by side pass through buffers of so many.
constexpr int64_t BUFFER_ELEMENTS = 512;

inline bool is_float(int32_t dtype) { return dtype >= HEEDFUL_FLOAT32 && dtype <= HEEDFUL_FLOAT64; }
inline int64_t element_bytes(int32_t dtype) {
    return dtype == HEEDFUL_FLOAT32 || dtype == HEEDFUL_INT32   ? 4
           : dtype == HEEDFUL_FLOAT64 || dtype == HEEDFUL_INT64 ? 8
           : dtype == HEEDFUL_BOOL                              ? 1
                                                                : 2;
}
// What a type is computed in: FLOAT64 for itself, FLOAT32 for the others.
inline int32_t computed_dtype(int32_t dtype) { return dtype == HEEDFUL_FLOAT64 ? HEEDFUL_FLOAT64 : HEEDFUL_FLOAT32; }

inline int64_t count_elements(const heedful_array &array) {
    int64_t count = 1;
    for (int32_t dim = 0; dim < array.ndim; ++dim) count *= array.size[dim];
    return count;
}

// Throws unless the array is of a floating type.
inline void check_array(const char *name, const heedful_array &array) {
    REQUIRE(is_float(array.dtype), std::string(name) + ": has dtype code " + std::to_string(array.dtype) +
                                       ", takes float32, bfloat16, float16 or float64");
    REQUIRE(array.ndim >= 0 && array.ndim <= MAX_DIMS, std::string(name) + ": has " + std::to_string(array.ndim) +
                                                           " dimensions, takes up to " + std::to_string(MAX_DIMS));
    for (int32_t dim = 0; dim < array.ndim; ++dim)
        REQUIRE(array.size[dim] >= 0, std::string(name) + ": a size is negative");
    REQUIRE(array.data || count_elements(array) == 0, std::string(name) + ": has no data");
}
// Throws unless the array is like another, which was checked.
inline void check_like(const char *name, const heedful_array &array, const char *other_name,
                       const heedful_array &other) {
    bool same = array.dtype == other.dtype && array.ndim == other.ndim;
    for (int32_t dim = 0; same && dim < array.ndim; ++dim) same = array.size[dim] == other.size[dim];
    REQUIRE(same, std::string(name) + ": takes the shape and dtype of " + other_name);
    REQUIRE(array.data || count_elements(array) == 0, std::string(name) + ": has no data");
}
// Throws unless the array is contiguous, of so many elements and this dtype.
inline void check_result(const char *name, const heedful_array &array, int64_t count, int32_t dtype) {
    int64_t stride = 1;
    bool dense = array.dtype == dtype && count_elements(array) == count && (array.data || count == 0);
    for (int32_t dim = array.ndim - 1; dense && dim >= 0; --dim) {
        dense = array.size[dim] == 1 || array.stride[dim] == stride;
        stride *= array.size[dim];
    }
    REQUIRE(dense, std::string(name) + ": takes " + std::to_string(count) + " contiguous elements of dtype code " +
                       std::to_string(dtype));
}

enum Role {
    READ,
    READ_EQUAL, // as READ; where all elements of a run are one and the same, the run has it once, with step 0
    WRITTEN,
};

// One of the arrays of a loop: its data and its strides along the loop's dimensions, in elements.
struct Operand {
    void *data;
    int64_t bytes; // of an element
    const int64_t *stride;
    Role role;

    Operand() = default;
    Operand(const heedful_array &array, Role role)
        : data(array.data), bytes(element_bytes(array.dtype)), stride(array.stride), role(role) {}
    Operand(void *data, int64_t bytes, const int64_t *stride, Role role)
        : data(data), bytes(bytes), stride(stride), role(role) {}
};

// What a body gets: n elements of each array, side by side.
template <int N> struct Run {
    char *data[N];
    int64_t n;
    int64_t step[N]; // 1, or 0 for a READ_EQUAL array that has its one element there
    int64_t item;    // of items(), the same whatever the threads; an item's runs come one after the other
    int64_t group;   // of groups(): of all rows that the item has a part of
    int64_t column;  // of the first element, in the loop's last dimension
};

// The dimensions of N arrays, put in the order of the first one's memory and merged where all of them allow it. What
// remains is rows and columns: all dimensions but the last, and the last.
template <int N> class Loop {
  public:
    // A work item has at least min_rows rows where there are as many.
    Loop(int32_t ndim, const int64_t *size, const Operand (&operands)[N], int64_t min_rows = 1) {
        std::copy_n(operands, N, operand_);
        int32_t order[MAX_DIMS], count = 0;
        for (int32_t dim = 0; dim < ndim; ++dim) {
            if (size[dim] == 1) continue;
            if (size[dim] == 0) empty_ = true;
            int32_t at = count++;
            const int64_t *const first = operand_[0].stride;
            for (; at > 0 && std::abs(first[order[at - 1]]) < std::abs(first[dim]); --at) order[at] = order[at - 1];
            order[at] = dim;
        }
        for (int32_t index = 0; index < count; ++index) append(size[order[index]], order[index]);
        if (dims_ == 0) {
            size_[dims_] = 1;
            for (int i = 0; i < N; ++i) stride_[dims_][i] = 1;
            ++dims_;
        }
        columns_ = size_[dims_ - 1];
        rows_ = 1;
        for (int dim = 0; dim < dims_ - 1; ++dim) rows_ *= size_[dim];
        if (empty_) return;
        item_rows_ = std::min(rows_, std::max(min_rows, ITEM_ELEMENTS / columns_));
        item_columns_ = std::min(columns_, std::max<int64_t>(ITEM_ELEMENTS / item_rows_, 1024));
        const int64_t groups = even_items(rows_, item_rows_), pieces = even_items(columns_, item_columns_);
        if (min_rows == 1) item_rows_ = (rows_ + groups - 1) / groups;
        item_columns_ = (columns_ + pieces - 1) / pieces;
        if (pieces > 1) item_columns_ = (item_columns_ + 63) / 64 * 64; // whole cache lines
        pieces_ = (columns_ + item_columns_ - 1) / item_columns_;
        groups_ = (rows_ + item_rows_ - 1) / item_rows_;
    }

    int64_t rows() const { return rows_; }
    int64_t columns() const { return columns_; }
    int64_t groups() const { return groups_; }
    int64_t items() const { return groups_ * pieces_; }
    // Of the array, along the columns.
    int64_t step(int array) const { return stride_[dims_ - 1][array]; }

    // begin(run) before an item's first run, with its group, item, column and n, the columns that it has.
    template <class Begin, class Body> void run(const heedful_threads *threads, Begin begin, Body body) const {
        if (empty_) return;
        share_out(threads, items(), [&](auto claim) {
            for (int64_t item = claim(); item >= 0; item = claim()) run_item(item, begin, body);
        });
    }
    template <class Body> void run(const heedful_threads *threads, Body body) const {
        run(threads, [](const Run<N> &) {}, body);
    }

  private:
    void append(int64_t size, int32_t dim) {
        bool merges = dims_ > 0;
        for (int i = 0; merges && i < N; ++i) merges = stride_[dims_ - 1][i] == size * operand_[i].stride[dim];
        if (merges) {
            size_[dims_ - 1] *= size;
        } else {
            size_[dims_++] = size;
        }
        for (int i = 0; i < N; ++i) stride_[dims_ - 1][i] = operand_[i].stride[dim];
    }

    template <class Begin, class Body> void run_item(int64_t item, Begin begin, Body body) const {
        Run<N> run;
        run.item = item;
        run.group = item / pieces_;
        run.column = item % pieces_ * item_columns_;
        const int64_t n = std::min(item_columns_, columns_ - run.column);
        const int64_t first = run.group * item_rows_, last = std::min(first + item_rows_, rows_);
        bool dense = true;
        for (int i = 0; i < N; ++i) {
            run.data[i] = static_cast<char *>(operand_[i].data) + run.column * step(i) * operand_[i].bytes;
            run.step[i] = step(i) == 0 && operand_[i].role == READ_EQUAL ? 0 : 1;
            dense = dense && (n == 1 || step(i) == run.step[i]);
        }
        int64_t index[MAX_DIMS], rest = first;
        for (int dim = dims_ - 2; dim >= 0; --dim) {
            index[dim] = rest % size_[dim];
            rest /= size_[dim];
            for (int i = 0; i < N; ++i) run.data[i] += index[dim] * stride_[dim][i] * operand_[i].bytes;
        }
        run.n = n;
        begin(run);
        for (int64_t row = first;;) {
            if (dense) body(run);
            else through_buffers(run, n, body);
            if (++row == last) return;
            for (int dim = dims_ - 2;; --dim) {
                const bool wraps = ++index[dim] == size_[dim];
                if (wraps) index[dim] = 0;
                const int64_t move = wraps ? 1 - size_[dim] : 1;
                for (int i = 0; i < N; ++i) run.data[i] += move * stride_[dim][i] * operand_[i].bytes;
                if (!wraps) break;
            }
        }
    }

    template <class Body> void through_buffers(const Run<N> &row, int64_t n, Body body) const {
        alignas(64) char buffer[N][BUFFER_ELEMENTS * 8];
        Run<N> run = row;
        for (int64_t begin = 0; begin < n; begin += BUFFER_ELEMENTS) {
            run.column = row.column + begin;
            run.n = std::min(BUFFER_ELEMENTS, n - begin);
            for (int i = 0; i < N; ++i) {
                char *const at = row.data[i] + begin * step(i) * operand_[i].bytes;
                const bool direct = step(i) == run.step[i];
                run.data[i] = direct ? at : buffer[i];
                if (!direct && operand_[i].role != WRITTEN) copy(buffer[i], 1, at, step(i), run.n, operand_[i].bytes);
            }
            body(run);
            for (int i = 0; i < N; ++i)
                if (operand_[i].role == WRITTEN && step(i) != run.step[i])
                    copy(row.data[i] + begin * step(i) * operand_[i].bytes, step(i), buffer[i], 1, run.n,
                         operand_[i].bytes);
        }
    }

    static void copy(char *to, int64_t to_step, const char *from, int64_t from_step, int64_t n, int64_t bytes) {
        switch (bytes) {
        case 2:
            return copy_as<uint16_t>(to, to_step, from, from_step, n);
        case 4:
            return copy_as<uint32_t>(to, to_step, from, from_step, n);
        default:
            return copy_as<uint64_t>(to, to_step, from, from_step, n);
        }
    }
    template <class Word>
    static void copy_as(char *to, int64_t to_step, const char *from, int64_t from_step, int64_t n) {
        for (int64_t i = 0; i < n; ++i)
            reinterpret_cast<Word *>(to)[i * to_step] = reinterpret_cast<const Word *>(from)[i * from_step];
    }

    Operand operand_[N];
    int64_t size_[MAX_DIMS], stride_[MAX_DIMS][N];
    int dims_ = 0;
    bool empty_ = false;
    int64_t rows_, columns_, item_rows_ = 0, item_columns_ = 0, pieces_ = 0, groups_ = 0;
};

} // namespace heedful
