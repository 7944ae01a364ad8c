// A schedule as the kernels see it: which keys of a block the rows of a tile attend to. Plain types, because
// the kernels of every instruction set include this (see kernels/tier.h).
#pragma once

#include <cstdint>

namespace heedful {

class Schedule;

// Keys are split at fixed absolute multiples of this, whatever the schedule, so that a row's rounding
// depends on its own keys alone. 256 scores of 24 rows stay in a 32 KiB L1 beside the operands.
constexpr int64_t KEY_BLOCK = 256;
constexpr int BLOCK_WORDS = KEY_BLOCK / 64;
constexpr int MAX_TILE_ROWS = 24;
constexpr int MAX_UNITS = 64; // a unit is at least 4 keys

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
    // Keys: the block that begins at k_begin (a multiple of KEY_BLOCK).
    void expand(int64_t first_head, int64_t group, int64_t first_row, int rows, int64_t k_begin, int unit,
                Expansion &out) const;

  private:
    const Schedule &schedule_;
    int64_t batch_index_, count_;
    int32_t *atoms_; // indices into the schedule's
};

} // namespace heedful
