// A schedule as the kernels see it: which keys of a block the rows of a tile attend to. Plain types, because
// the kernels of every instruction set include this (see kernels/tier.h).
#pragma once

#include <cstdint>

#include "kernels/blocking.h"

namespace heedful {

class Schedule;

// What one tile of rows sees of one key block. Units are runs of `unit` keys, counted from the block's
// begin; only those with a pair that counts are listed.
struct Expansion {
    int unit_count;
    uint8_t index[MAX_UNITS];
    bool partial[MAX_UNITS];
    uint64_t row[MAX_TILE_ROWS][BLOCK_WORDS]; // bit k: key k of the block counts for this row
    uint64_t used[BLOCK_WORDS];               // bit k: key k counts for a row of the tile
};

// The atoms of a schedule that touch some rows of one batch item.
class AtomSelection {
  public:
    AtomSelection(const Schedule &schedule, int64_t batch_index, int64_t q_begin, int64_t q_end);
    ~AtomSelection();
    AtomSelection(const AtomSelection &) = delete;
    AtomSelection &operator=(const AtomSelection &) = delete;

    // The smallest range [low, high) of keys outside of which queries [q_begin, q_end) see nothing.
    void hull(int64_t q_begin, int64_t q_end, int64_t &low, int64_t &high) const;

    // Rows: row r of the tile is query (first_row + r) / group of head first_head + (first_row + r) % group.
    // Keys: the `keys` (at most KEY_BLOCK, whole words of 64) from k_begin on.
    void expand(int64_t first_head, int64_t group, int64_t first_row, int rows, int64_t k_begin, int64_t keys, int unit,
                Expansion &out) const;
    // The smallest range [low, high) of queries that see a key of [k_begin, k_end).
    void rows_hull(int64_t k_begin, int64_t k_end, int64_t &low, int64_t &high) const;

  private:
    const Schedule &schedule_;
    int64_t batch_index_, count_;
    int32_t *atoms_; // indices into the schedule's
    int32_t few_[8]; // where they are, if there is room: tiny calls make one selection for every head
};

} // namespace heedful
