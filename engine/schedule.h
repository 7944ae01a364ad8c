// A schedule with its lengths known: rectangles cut by diagonals, and their expansion to runs of tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "heedful.h"
#include "selection.h"

namespace heedful {

// The keys j with floor((i - q_origin + offset) / size) == floor((j - k_origin) / size).
struct Chunk {
    int64_t size, offset, q_origin, k_origin;
};

// A restriction read from the caller's memory: a map of blocks, or a mask (size 1).
struct Filter {
    const uint8_t *data;
    int64_t size; // of a block, in queries and in keys
    int64_t stride[4];
};

// The pairs (i, j) with q_begin <= i < q_end, k_begin <= j < k_end, d_low <= j - i <= d_high,
// j - i = residue (mod step), inside every chunk and let through by every filter of its ranges.
struct Atom {
    int64_t q_begin, q_end, k_begin, k_end, d_low, d_high;
    int64_t step, residue;
    int32_t chunk_begin, chunk_end, filter_begin, filter_end;

    bool interval() const { return step == 1 && filter_begin == filter_end; }
    // Its diagonals are the only restriction beside its ends.
    bool interval_of_step() const { return filter_begin == filter_end && chunk_begin == chunk_end; }
};

class Schedule {
  public:
    // Throws Error (error.h) on a code that does not decode, or whose operands are not those of such a call.
    Schedule(const heedful_schedule &source, int64_t batch, int64_t heads, int64_t q_length, int64_t k_length);

    // The step g, 1 where there is none, such that every pair has j - i = residue (mod g): the queries and keys then
    // fall into g classes that have nothing to do with each other, each dense where the whole is not.
    int64_t common_step(int64_t &residue) const;
    // The same pairs within one class, queries and keys counted there.
    Schedule(const Schedule &whole, int64_t step, int64_t query_class, int64_t key_class, int64_t q_length,
             int64_t k_length);

    // Whether heads differ: then the rows of one query must be expanded one by one.
    bool per_head() const { return per_head_; }

    // Calls body with the index of every atom that can touch rows [q_begin, q_end), in order.
    template <class Body> void for_atoms(int64_t batch_index, int64_t q_begin, int64_t q_end, Body body) const {
        const int64_t item = shared_ ? 0 : batch_index;
        for (int64_t a = batch_begin_[item]; a < batch_begin_[item + 1]; ++a)
            if (atoms_[a].q_begin < q_end && q_begin < atoms_[a].q_end) body(int32_t(a));
    }

    // Pairs that count among rows [q_begin, q_end), gaps inside a row's range not subtracted: the
    // balance of work needs no more.
    int64_t work(int64_t batch_index, int64_t q_begin, int64_t q_end) const;

  private:
    friend class AtomSelection;
    void add_atoms(const int64_t *code, int64_t length, int64_t batch_index, const heedful_schedule &source);
    void row_range(const Atom &atom, int64_t query, int64_t &low, int64_t &high) const;
    class Sieve;

    int64_t q_length_, k_length_;
    bool shared_ = true; // one list of atoms serves every batch item
    bool per_head_ = false;
    std::vector<Atom> atoms_;
    std::vector<Chunk> chunks_;
    std::vector<Filter> filters_;
    std::vector<int64_t> batch_begin_;
};

} // namespace heedful
