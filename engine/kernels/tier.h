// What an instruction-set tier offers to the rest of the engine, and what it is handed. Plain types only:
// an inline function of the standard library compiled here for AVX-512 could replace everybody's copy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../selection.h"

namespace heedful {

// One forward call. Rows are (query, head of the group) with the head running fastest: the heads that
// share a key head share its packed keys, and a tile of rows spans few queries.
struct ForwardCall {
    const char *query, *key, *value;
    char *out;
    void *lse; // (batch, heads, q_length), or null
    int64_t query_stride[4], key_stride[4], value_stride[4], out_stride[4];
    int64_t batch, heads, kv_heads, group, q_length, k_length, head_dim, value_dim;
    double scale;
    const Schedule *schedule;
    int64_t block_rows; // rows of a work item
};

// The part of a call that one thread claims: a run of rows of one key head.
struct ForwardItem {
    int64_t batch_index, kv_head, first_row, rows;
};

struct ForwardKernel {
    size_t (*scratch_bytes)(const ForwardCall &call);
    size_t (*row_bytes)(const ForwardCall &call); // of it, per row of a work item
    void (*run)(const ForwardCall &call, const ForwardItem &item, char *scratch);
};

struct Tier {
    const char *name;
    ForwardKernel forward[4]; // by heedful_dtype
    // Multiply-adds register to register for a number of rounds; returns the FLOPs done.
    double (*burn[4])(int64_t rounds);
    // Reads a buffer once; the sum keeps the reads alive.
    double (*read)(const char *data, size_t bytes);
};

extern const Tier TIER_PORTABLE, TIER_AVX2, TIER_AVX512, TIER_AVX512_BF16;

} // namespace heedful
