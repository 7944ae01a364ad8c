/* heedful: exact attention on a CPU, as a plain C interface, from C99 and C++ on.
 *
 * Link with libheedful_engine: `pkg-config --cflags --libs heedful`, or heedful::engine of CMake's
 * find_package(heedful). It needs nothing but the C++ runtime.
 *
 * No function throws, none keeps a pointer past its return, and every one may be called from several
 * threads at once. Functions that can fail return a heedful_status; heedful_error_message() then says,
 * for the calling thread, which argument was wrong, what it held and what it takes. Structures begin as
 * zeros, which mean that there is nothing; then the fields that a call needs are filled in.
 *
 * HEEDFUL_ABI_VERSION is that of the structures and of what their fields mean. A program runs with any
 * library whose heedful_abi_version() is the one that it was compiled with; functions, and values that a
 * field may have, are added without changing it.
 */
#ifndef HEEDFUL_H
#define HEEDFUL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HEEDFUL_ABI_VERSION 2
#define HEEDFUL_API __attribute__((visibility("default")))

typedef enum heedful_status {
    HEEDFUL_OK = 0,
    HEEDFUL_INVALID_ARGUMENT = 1,
    HEEDFUL_UNSUPPORTED = 2,
    HEEDFUL_OUT_OF_MEMORY = 3
} heedful_status;

typedef enum heedful_dtype {
    HEEDFUL_FLOAT32 = 0,
    HEEDFUL_BFLOAT16 = 1,
    HEEDFUL_FLOAT16 = 2,
    HEEDFUL_FLOAT64 = 3,
    HEEDFUL_INT32 = 4,
    HEEDFUL_BOOL = 5, /* one byte, 0 or 1 */
    HEEDFUL_INT64 = 6
} heedful_dtype;

/* A view of memory that the caller owns. Strides count elements and may be 0 (broadcast) or negative. */
typedef struct heedful_tensor {
    void *data;
    int32_t dtype; /* heedful_dtype */
    int32_t ndim;  /* 1 to 4; sizes and strides past it are not read */
    int64_t size[4];
    int64_t stride[4];
} heedful_tensor;

/* Which (query, key) pairs count: a code, and the tensors that it refers to by their number among the
 * operands. It does not depend on lengths. An empty code (code_length 0) means every pair; a pair counts where
 * some atom holds, and an atom where all of its terms do:
 *
 * code: the number of atoms; then for each the number of its terms, then these, each
 *   0, axis, side, bound   the query i (axis 0), the key j (1) or the diagonal j - i (2) is at least (side 0) or at
 *                          most (1) the bound
 *   1, step, bound         step divides j - i - bound
 *   2, size, bound         floor((i + bound) / size) == floor(j / size)
 *   3, n                   i and j lie in the same of the documents whose ends are operands n (of queries) and n + 1
 *                          (of keys), both INT32 (documents + 1), from 0 on
 *   4, size, n             operand n, BOOL (B or 1, H or 1, blocks, blocks), holds at [b][h][i / size][j / size]
 *   5, n                   operand n, BOOL (B or 1, H or 1, Lq or 1, Lk or 1), holds at [b][h][i][j]
 * bound: const, symbol, sign, frame, the number const + sign * S, where S is 0 for symbol -1, Lk - Lq for -2, and for
 *   n >= 0 the batch item's number in operand n, INT32 (B or 1); sign is 1 or -1. Frame is -1, or the n of a document
 *   term of the same atom: i, j, Lq and Lk are then counted inside the document. */
typedef struct heedful_schedule {
    const int64_t *code;
    int64_t code_length;
    const heedful_tensor *operands;
    int64_t operand_count;
} heedful_schedule;

/* Codes, as in: const int64_t code[] = HEEDFUL_CAUSAL; the last query meets the last key.
 * CAUSAL            a query sees its own position and those before it
 * WINDOW            from `left` positions before its own to `right` after it, both inclusive
 * LENGTHS           the first keys of its batch item, as many as operand 0 says, INT32 (B)
 * DOCUMENTS         its own document, between the ends that are operands 0 and 1
 * CAUSAL_DOCUMENTS  there, its own position and those before it, the last query at the last key */
#define HEEDFUL_CAUSAL {1, 1, 0, 2, 1, 0, -2, 1, -1}
#define HEEDFUL_WINDOW(left, right) {1, 2, 0, 2, 0, -(left), -2, 1, -1, 0, 2, 1, (right), -2, 1, -1}
#define HEEDFUL_LENGTHS {1, 1, 0, 1, 1, -1, 0, 1, -1}
#define HEEDFUL_DOCUMENTS {1, 1, 3, 0}
#define HEEDFUL_CAUSAL_DOCUMENTS {1, 2, 0, 2, 1, 0, -2, 1, 0, 3, 0}

/* How the engine runs in parallel: it calls run(pool, count, body, argument), which must call
 * body(argument, index) once for every index in [0, count), on any threads, and return when all are
 * done. NULL runs everything on the calling thread. Results never depend on count. */
typedef struct heedful_threads {
    int64_t count;
    void (*run)(void *pool, int64_t count, void (*body)(void *argument, int64_t index), void *argument);
    void *pool;
} heedful_threads;

/* What happens to a score s = scale * query . key before the softmax, in this order, and to the weights after
 * it. All zero: nothing. A tensor whose data is NULL is left out.
 *
 * softcap       > 0: s = softcap * tanh(s / softcap)
 * bias          (B, H, Lq, Lk), each size may be 1, query's dtype or FLOAT32: added; -inf excludes the pair
 * alibi_slopes  (B or 1, H), or (B or 1, H, Lq or 1) for a slope per query, query's dtype or FLOAT32:
 *               -slope * |i + offset - j| is added, where
 * query_offset  (B or 1), or (B or 1, Lq or 1) for one per query, INT32, is the offset; Lk - Lq where it is left out
 * sinks         (H), query's dtype or FLOAT32: a score that joins each row's denominator and lse
 * dropout_p     each weight is zeroed with this probability, the others grow by 1 / (1 - dropout_p); weight
 *               (b, h, i, j) takes word (j / 16) % 4 of Philox4x32-10 with the seed as key and the counter
 *               (16 * (j / 64) + j % 16, i, h, b), and is kept where that word is at least dropout_p * 2^32 */
typedef struct heedful_features {
    heedful_tensor bias, alibi_slopes, query_offset, sinks;
    double softcap, dropout_p;
    uint64_t seed;
} heedful_features;

/* out = softmax(scale * query key^T, over the pairs that count) value.
 *
 * query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), out (B, H, Lq, Dv): one dtype, any
 * strides; H % Hkv == 0. lse (B, H, Lq), FLOAT32 (FLOAT64 for FLOAT64 inputs), contiguous, natural logarithm;
 * its data may be NULL. A query with no key gets output 0 and lse -inf (the sink where there is one).
 *
 * pages (B, n), INT32, its data NULL for none: key and value are then pools (blocks, Hkv, P, D or Dv), Lk is
 * n * P, and key j of batch item b is row j % P of block pages[b][j / P]. Entries that no pair reaches are not
 * read. */
typedef struct heedful_forward {
    heedful_tensor query, key, value, out, lse;
    double scale;
    heedful_schedule schedule;
    heedful_features features;
    heedful_tensor pages;
} heedful_forward;

HEEDFUL_API heedful_status heedful_attention_forward(const heedful_forward *arguments, const heedful_threads *threads);

/* Gradients of the forward call with the same arguments, which left out and lse.
 *
 * grad_out as out; grad_lse (B, H, Lq) as lse, or NULL; grad_weights (B, H, Lq, Lk) in query's dtype, any
 * strides, or NULL: what arrived for weights returned by heedful_attention_weights. For those, the caller
 * subtracts the row sums of weights * grad_weights from grad_lse.
 * Written: grad_query, grad_key, grad_value as query, key, value (any strides); delta (B, H, Lq) as lse, the
 * row sums of grad_out * out less grad_lse, from which the gradient of sinks is -sum exp(sink - lse) * delta;
 * grad_bias, or NULL: contiguous (bias's B, H, Lq sizes, Lk) in lse's dtype; grad_slopes, or NULL: contiguous
 * (B, H, Lq) in lse's dtype, each row's share of the gradient of its alibi slope. */
typedef struct heedful_backward {
    heedful_tensor query, key, value, out, lse, grad_out, grad_lse, grad_weights;
    heedful_tensor grad_query, grad_key, grad_value, delta, grad_bias, grad_slopes;
    double scale;
    heedful_schedule schedule;
    heedful_features features;
} heedful_backward;

HEEDFUL_API heedful_status heedful_attention_backward(const heedful_backward *arguments,
                                                      const heedful_threads *threads);

/* The weights exp(score - lse) of the pairs that count, after dropout, given the lse of the forward call. With
 * sinks they sum to less than 1. One of three outputs, by whose data is not NULL:
 * weights  dense (B, H, Lq, Lk), query's dtype, any strides, 0 where a pair does not count
 * values   (n), query's dtype, contiguous, with indices (4, n), INT64, the b, h, i, j of each, and row_begin
 *          (B, H, Lq), INT64, contiguous: where each row's pairs begin, by ascending j
 * counts   (B, H, Lq), INT64, contiguous: pairs of each row */
typedef struct heedful_weights {
    heedful_tensor query, key, lse, weights, values, indices, row_begin, counts;
    double scale;
    heedful_schedule schedule;
    heedful_features features;
} heedful_weights;

HEEDFUL_API heedful_status heedful_attention_weights(const heedful_weights *arguments, const heedful_threads *threads);

/* A dense mask, read once. mask (B, H, Lq, Lk), keys side by side; B, H and Lq may be 1, and count as 1 where their
 * stride is 0. BOOL: 1 where the pair counts. A float type: a bias of which 0 counts and -inf excludes, and so does a
 * finite number of at most -1e30 in a row that has a 0.
 *
 * heedful_mask_band: kind 1 where a pair counts exactly if low <= j - i <= high; 2 where it counts exactly if also
 * start[b] <= j < stop[b], written for each item of the mask into the caller's memory; otherwise 0. An end without a
 * limit is -Lq or Lk. */
typedef struct heedful_band {
    int64_t low, high;
    int32_t *start, *stop;
    int32_t kind;
} heedful_band;

HEEDFUL_API heedful_status heedful_mask_band(const heedful_tensor *mask, int64_t q_length, int64_t k_length,
                                             heedful_band *band, const heedful_threads *threads);

/* heedful_mask_tiles: 1 in full where all pairs of a tile count, 1 in partial where some but not all do, both the
 * caller's, contiguous (B, H, ceil(Lq / tile), ceil(Lk / tile)); in pairs, unless it is NULL, (B, H, Lq, Lk), 1 where a
 * pair counts. kind is 1, or 0 and the rest undefined: where a float mask holds other numbers than those above, or
 * where most tiles of a sample are partial, so that knowing them helps nobody. */
typedef struct heedful_mask_tiling {
    int64_t tile;
    uint8_t *full, *partial, *pairs;
    int64_t full_count, partial_count;
    int32_t kind;
} heedful_mask_tiling;

HEEDFUL_API heedful_status heedful_mask_tiles(const heedful_tensor *mask, int64_t q_length, int64_t k_length,
                                              heedful_mask_tiling *tiling, const heedful_threads *threads);

/* The schedule expanded for one batch item and head, as the kernels expand it.
 * mask: q_length * k_length bytes, 1 where the pair counts.
 * tiles: ceil(q_length / tile_q) * ceil(k_length / tile_k) bytes: 0 empty, 1 partial, 2 full. */
HEEDFUL_API heedful_status heedful_schedule_mask(const heedful_schedule *schedule, int64_t batch, int64_t batch_index,
                                                 int64_t head_index, int64_t q_length, int64_t k_length, uint8_t *mask);
HEEDFUL_API heedful_status heedful_schedule_tiles(const heedful_schedule *schedule, int64_t batch, int64_t batch_index,
                                                  int64_t head_index, int64_t q_length, int64_t k_length,
                                                  int64_t tile_q, int64_t tile_k, uint8_t *tiles);

/* The message of the last failure on this thread; empty when there was none. */
HEEDFUL_API const char *heedful_error_message(void);
/* The library's version, as in "0.1.0", and the version of this interface. */
HEEDFUL_API const char *heedful_version(void);
HEEDFUL_API int32_t heedful_abi_version(void);

/* Instruction-set tiers, from the plainest (index 0) up. HEEDFUL_ISA caps the choice by name; it is
 * read once, when the library is first used. */
HEEDFUL_API int32_t heedful_isa_count(void);
HEEDFUL_API const char *heedful_isa_name(int32_t index);
HEEDFUL_API int32_t heedful_isa_runnable(int32_t index); /* 1 where this processor has it, whatever the cap */
HEEDFUL_API int32_t heedful_isa_selected(void);          /* index of the tier in use */

/* The engine's own constants, by index: a cost model picks each from the shape and the tier; a value above 0 takes
 * its place, 0 gives it back. Setting one while calls run gives each call either value. Bits of results may
 * differ between values, never between thread counts. */
HEEDFUL_API int32_t heedful_tuning_count(void);
HEEDFUL_API const char *heedful_tuning_name(int32_t index);
HEEDFUL_API int64_t heedful_tuning_get(int32_t index);
HEEDFUL_API heedful_status heedful_tuning_set(int32_t index, int64_t value);

/* Threads for a program that has none of its own: fills in `threads`, for any number of calls at once, with a pool of
 * `count` threads in all (0: one for each processor that this process may use), of which a call brings one itself.
 * destroy, when no call uses them any more, ends the pool and leaves `threads` as one thread, the caller's; it does
 * nothing to threads that are not a pool's. In a forked child an inherited pool runs everything on the calling thread,
 * and a pool made there has threads again. */
HEEDFUL_API heedful_status heedful_pool_create(int64_t count, heedful_threads *threads);
HEEDFUL_API void heedful_pool_destroy(heedful_threads *threads);

/* Frees the scratch memory that idle threads keep between calls, and says how many bytes it was. */
HEEDFUL_API int64_t heedful_clear_caches(void);

/* Measured ceilings of one core, for shares of the limit: multiply-add rate in FLOP/s of the selected
 * tier for a dtype (register to register), and read bandwidth in bytes/s over a buffer of that size. */
HEEDFUL_API double heedful_peak_flops(int32_t dtype, double seconds);
HEEDFUL_API double heedful_read_bandwidth(size_t bytes, double seconds);

#ifdef __cplusplus
}
#endif
#endif
