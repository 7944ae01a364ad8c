// What an instruction-set tier offers to the rest of the engine, and what it is handed. Plain types only:
// an inline function of the standard library compiled here for AVX-512 could replace everybody's copy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../selection.h"

namespace heedful {

// A tensor that may be left out (no data); strides are 0 where it is broadcast.
struct Extra {
    const char *data;
    int32_t dtype; // heedful_dtype
    int64_t stride[4];
};

// What happens to the scores beside scaling, as heedful_features says.
struct Features {
    Extra bias, slopes, sinks;
    const int32_t *offset;      // of the queries among the keys, for ALiBi
    int64_t offset_stride[2];   // by batch item and by query
    double softcap, kept_share; // kept_share: 1 - dropout_p
    uint32_t threshold;         // a weight is dropped where its random word is below
    uint64_t seed;

    bool change_scores() const { return bias.data || slopes.data || softcap > 0; }
    bool drop() const { return kept_share < 1; }
};

// Keys and values in pages; see heedful_forward.
struct Pages {
    const int32_t *table; // null for none
    int64_t batch_stride, stride, size, blocks;
};

// Query, key and value of a call and what counts among them. Rows are (query, head of the group) with the
// head running fastest: the heads that share a key head share its packed keys, and a tile of rows spans few
// queries.
struct Inputs {
    const char *query, *key, *value;
    int64_t query_stride[4], key_stride[4], value_stride[4];
    int64_t batch, heads, kv_heads, group, q_length, k_length, head_dim, value_dim;
    double scale;
    Features features;
    const Schedule *schedule;
    Pages pages;
    int64_t prefetch_bytes; // how far ahead of the keys in use the next are asked for
    // Query i and key j here are q_origin + step * i and k_origin + step * j of the caller, who has caller_q_length
    // queries, and whose query i meets key i + position.
    int64_t q_origin, k_origin, step, caller_q_length, position;

    int64_t rows() const { return q_length * group; }
    int64_t pairs() const { return batch * kv_heads; }
    // Where a row's statistics lie.
    int64_t statistic(int64_t batch_index, int64_t head, int64_t query) const {
        return (batch_index * heads + head) * caller_q_length + q_origin + step * query;
    }
};

struct ForwardCall : Inputs {
    char *out;
    void *lse; // (batch, heads, q_length), or null
    int64_t out_stride[4];
    int64_t block_rows; // rows of a work item
    bool direct;        // read keys and values where they lie instead of packing them
};

// The part of a call that one thread claims: a run of rows of one key head, against keys [key_begin, key_end).
struct ForwardItem {
    int64_t batch_index, kv_head, first_row, rows, key_begin, key_end;
    char *partial; // where sums over these keys alone go, to be merged; null where they are all the keys
};

struct ForwardKernel {
    size_t (*scratch_bytes)(const ForwardCall &call);
    size_t (*row_bytes)(const ForwardCall &call); // of it, per row of a work item
    void (*run)(const ForwardCall &call, const ForwardItem &item, char *scratch);
    size_t (*partial_bytes)(const ForwardCall &call, int64_t rows);
    // Adds up the parts of an item's rows in order; part p lies at parts + p * partial_bytes.
    void (*merge)(const ForwardCall &call, const ForwardItem &item, const char *parts, int64_t count, char *scratch);
};

// What the backward shares between threads: one running gradient of the queries, to which each key block adds in
// its turn.
struct BackwardCall : Inputs {
    const char *out, *grad_out, *grad_weights; // grad_weights may be null
    const void *lse, *grad_lse;                // (batch, heads, q_length); grad_lse may be null
    char *grad_query, *grad_key, *grad_value;
    void *delta, *grad_bias, *grad_slopes; // grad_bias and grad_slopes may be null
    int64_t out_stride[4], grad_out_stride[4], grad_weights_stride[4];
    int64_t grad_query_stride[4], grad_key_stride[4], grad_value_stride[4], grad_bias_stride[4];
    int64_t block_keys, step_rows; // keys of a work item; rows whose weights are kept at once
    // The running gradients of the queries: by batch item, key head and row, in numbers; and by pair and row, in units
    // of 24 rows, the log-sum-exp in units of log2 and delta.
    void *sum, *row_lse, *row_delta;
    int64_t sum_stride[3], padded_rows;
};

struct BackwardItem {
    int64_t batch_index, kv_head, first_key, keys;
    // Waits until the sums of a step of rows hold all earlier key blocks, and says that they hold this one too.
    void *order;
    void (*wait)(void *order, int64_t step);
    void (*pass)(void *order, int64_t step);
};

struct BackwardKernel {
    size_t (*scratch_bytes)(const BackwardCall &call);
    void (*prepare)(const BackwardCall &call, int64_t batch_index, int64_t kv_head, int64_t first_row, int64_t rows);
    void (*run)(const BackwardCall &call, const BackwardItem &item, char *scratch);
    void (*finish)(const BackwardCall &call, int64_t batch_index, int64_t kv_head, int64_t first_row, int64_t rows);
    int64_t (*sum_width)(const BackwardCall &call); // numbers of a running gradient
    bool (*in_place)(const BackwardCall &call);     // whether grad_query itself can hold them
    size_t number_bytes;                            // of a running sum
    int64_t step_rows;                              // of a call, unless tuned
};

// Rows of a work item at most.
constexpr int64_t WEIGHT_ROWS = 10 * MAX_TILE_ROWS;

// The weights of a call, dense or as lists of pairs; see heedful_weights.
struct WeightsCall : Inputs {
    const void *lse;
    char *weights, *values;
    int64_t weights_stride[4];
    int64_t *indices, indices_stride;
    const int64_t *row_begin;
    int64_t *counts;
};

struct WeightsKernel {
    size_t (*scratch_bytes)(const WeightsCall &call);
    void (*run)(const WeightsCall &call, const ForwardItem &item, char *scratch);
};

struct Tier {
    const char *name;
    // By heedful_dtype.
    ForwardKernel forward[4];
    BackwardKernel backward[4];
    WeightsKernel weights[4];
    // Multiply-adds register to register for a number of rounds; returns the FLOPs done.
    double (*burn[4])(int64_t rounds);
    // Reads a buffer once; the sum keeps the reads alive.
    double (*read)(const char *data, size_t bytes);
};

extern const Tier TIER_PORTABLE, TIER_NEON, TIER_AVX2, TIER_AVX512, TIER_AVX512_BF16;

} // namespace heedful
