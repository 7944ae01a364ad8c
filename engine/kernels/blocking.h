// How the kernels of every tier cut their work, in one place. Plain constants, because code of every instruction
// set includes this.
#pragma once

#include <cstdint>

namespace heedful {

// What all tiers share. Keys are split at fixed absolute multiples of KEY_BLOCK, whatever the schedule, so that a
// row's rounding depends on its own keys alone. 256 scores of 24 rows stay in a 32 KiB L1 beside the operands.
constexpr int64_t KEY_BLOCK = 256;
constexpr int BLOCK_WORDS = KEY_BLOCK / 64;
constexpr int MAX_TILE_ROWS = 24;
constexpr int MAX_UNITS = 64; // a unit is two vectors of keys, of 2 doubles each or more

// What differs. A panel is the rows whose products a tile keeps in registers, two vectors each; beside them it needs
// two vectors of the operand and one scalar spread over a third.
struct Blocking {
    int vector_bytes, registers, panel_rows;
};
constexpr Blocking BLOCKING_PORTABLE = {16, 16, 6};
constexpr Blocking BLOCKING_NEON = {16, 32, 12};
constexpr Blocking BLOCKING_AVX2 = {32, 16, 6};
constexpr Blocking BLOCKING_AVX512 = {64, 32, 12}; // and avx512_bf16

#if defined(__AVX512F__)
constexpr Blocking BLOCKING = BLOCKING_AVX512;
#elif defined(__AVX2__)
constexpr Blocking BLOCKING = BLOCKING_AVX2;
#elif defined(HEEDFUL_TIER_NEON)
constexpr Blocking BLOCKING = BLOCKING_NEON;
#else
constexpr Blocking BLOCKING = BLOCKING_PORTABLE;
#endif

static_assert(2 * BLOCKING.panel_rows + 3 <= BLOCKING.registers, "a panel's sums must stay in registers");
static_assert(MAX_TILE_ROWS % BLOCKING.panel_rows == 0, "a tile of rows is whole panels");

} // namespace heedful
