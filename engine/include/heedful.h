/* heedful: exact attention on a CPU, as a plain C interface.
 *
 * No function throws, none keeps a pointer past its return, and every one may be called from several
 * threads at once. Functions that can fail return a heedful_status; heedful_error_message() then says,
 * for the calling thread, which argument was wrong, what it held and what it takes.
 */
#ifndef HEEDFUL_H
#define HEEDFUL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HEEDFUL_ABI_VERSION 1
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
    HEEDFUL_BOOL = 5 /* one byte, 0 or 1 */
} heedful_dtype;

/* A view of memory that the caller owns. Strides count elements and may be 0 (broadcast). */
typedef struct heedful_tensor {
    void *data;
    int32_t dtype; /* heedful_dtype */
    int32_t ndim;  /* 1 to 4; sizes and strides past it are not read */
    int64_t size[4];
    int64_t stride[4];
} heedful_tensor;

/* Which (query, key) pairs count: the encoded union of atoms that src/heedful/patterns/schedule.py
 * documents and writes, with the tensors its slots refer to (INT32 offsets, lengths and cu_seqlens,
 * BOOL block maps and masks). An empty code (code_length 0) means every pair. */
typedef struct heedful_schedule {
    const int64_t *code;
    int64_t code_length;
    const heedful_tensor *operands;
    int64_t operand_count;
} heedful_schedule;

/* How the engine runs in parallel: it calls run(pool, count, body, argument), which must call
 * body(argument, index) once for every index in [0, count), on any threads, and return when all are
 * done. NULL runs everything on the calling thread. Results never depend on count. */
typedef struct heedful_threads {
    int64_t count;
    void (*run)(void *pool, int64_t count, void (*body)(void *argument, int64_t index), void *argument);
    void *pool;
} heedful_threads;

/* out = softmax(scale * query key^T, over the pairs that count) value.
 *
 * query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), out (B, H, Lq, Dv): one dtype, any
 * strides; H % Hkv == 0. lse (B, H, Lq), FLOAT32 (FLOAT64 for FLOAT64 inputs), natural logarithm; its
 * data may be NULL. A query with no key gets output 0 and lse -inf. */
typedef struct heedful_forward {
    heedful_tensor query, key, value, out, lse;
    double scale;
    heedful_schedule schedule;
} heedful_forward;

HEEDFUL_API heedful_status heedful_attention_forward(const heedful_forward *arguments, const heedful_threads *threads);

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
