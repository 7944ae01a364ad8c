// The backward entry point: statistics of the rows, then blocks of keys in order, then the queries' gradients.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include <sched.h>

#include "inputs.h"
#include "isa.h"
#include "schedule.h"
#include "scratch.h"
#include "tuning.h"
#include "workers.h"

namespace heedful {
namespace {

// Keys of a block. More were faster at every head dim up to 256 (docs/performance/log.md), though all that is kept of
// them then no longer fits the L2 cache; beyond it the scratch memory of a thread would pass 4 MiB.
int64_t default_block_keys(const BackwardCall &call) { return call.head_dim + call.value_dim <= 512 ? 256 : 128; }

constexpr int64_t ROWS_AT_ONCE = 240; // of the phases that go over rows; a multiple of a tile

void read_gradient(const char *name, const heedful_tensor &gradient, const heedful_tensor &of, char *&data,
                   int64_t *stride) {
    check_tensor(name, gradient, 4, of.size, of.dtype);
    data = static_cast<char *>(gradient.data);
    std::copy_n(gradient.stride, 4, stride);
}

BackwardCall checked(const heedful_backward &arguments) {
    BackwardCall call = {};
    const int32_t dtype = arguments.query.dtype;
    read_inputs(arguments.query, arguments.key, &arguments.value, arguments.scale, arguments.features, nullptr, call);
    const int32_t statistics = statistics_dtype(dtype);
    const int64_t o_size[] = {call.batch, call.heads, call.q_length, call.value_dim};
    const int64_t w_size[] = {call.batch, call.heads, call.q_length, call.k_length};
    check_tensor("out", arguments.out, 4, o_size, dtype);
    check_tensor("grad_out", arguments.grad_out, 4, o_size, dtype);
    check_contiguous("lse", arguments.lse, 3, o_size, statistics);
    check_contiguous("delta", arguments.delta, 3, o_size, statistics);
    call.out = static_cast<const char *>(arguments.out.data);
    call.grad_out = static_cast<const char *>(arguments.grad_out.data);
    call.lse = arguments.lse.data;
    call.delta = arguments.delta.data;
    std::copy_n(arguments.out.stride, 4, call.out_stride);
    std::copy_n(arguments.grad_out.stride, 4, call.grad_out_stride);
    if (arguments.grad_lse.data) {
        check_contiguous("grad_lse", arguments.grad_lse, 3, o_size, statistics);
        call.grad_lse = arguments.grad_lse.data;
    }
    if (arguments.grad_weights.data) {
        check_tensor("grad_weights", arguments.grad_weights, 4, w_size, dtype);
        call.grad_weights = static_cast<const char *>(arguments.grad_weights.data);
        std::copy_n(arguments.grad_weights.stride, 4, call.grad_weights_stride);
    }
    if (arguments.grad_bias.data) {
        REQUIRE(call.features.bias.data, "grad_bias: there is no bias");
        int64_t size[4];
        std::copy_n(arguments.features.bias.size, 3, size);
        size[3] = call.k_length;
        check_contiguous("grad_bias", arguments.grad_bias, 4, size, statistics);
        call.grad_bias = arguments.grad_bias.data;
        for (int axis = 0; axis < 4; ++axis)
            call.grad_bias_stride[axis] = size[axis] == 1 ? 0 : arguments.grad_bias.stride[axis];
    }
    if (arguments.grad_slopes.data) {
        REQUIRE(call.features.slopes.data, "grad_slopes: there are no alibi_slopes");
        check_contiguous("grad_slopes", arguments.grad_slopes, 3, o_size, statistics);
        call.grad_slopes = arguments.grad_slopes.data;
    }
    read_gradient("grad_query", arguments.grad_query, arguments.query, call.grad_query, call.grad_query_stride);
    read_gradient("grad_key", arguments.grad_key, arguments.key, call.grad_key, call.grad_key_stride);
    read_gradient("grad_value", arguments.grad_value, arguments.value, call.grad_value, call.grad_value_stride);
    return call;
}

// How far each block of keys of one pair has come: it has added to all steps of rows from position on. Blocks are
// claimed in order, so whoever is waited for is at work.
struct Order {
    std::atomic<int64_t> *position; // of the pair's blocks
    int64_t block, first_unfinished;

    static void wait(void *self, int64_t step) {
        Order &order = *static_cast<Order *>(self);
        for (int64_t b = order.first_unfinished; b < order.block; ++b) {
            for (int spins = 0; order.position[b].load(std::memory_order_acquire) > step; ++spins) {
                if (spins > 1000) sched_yield();
#if defined(__x86_64__)
                else __builtin_ia32_pause();
#endif
            }
            if (b == order.first_unfinished && order.position[b].load(std::memory_order_acquire) == 0)
                ++order.first_unfinished;
        }
    }
    static void pass(void *self, int64_t step) {
        Order &order = *static_cast<Order *>(self);
        order.position[order.block].store(step, std::memory_order_release);
    }
    ~Order() { pass(this, 0); }
};

void over_rows(const BackwardCall &call, const heedful_threads *threads,
               void (*body)(const BackwardCall &, int64_t, int64_t, int64_t, int64_t)) {
    const int64_t runs = (call.padded_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, items = call.pairs() * runs;
    const bool small = call.pairs() * call.padded_rows * call.head_dim < (1 << 15);
    share_out(small ? nullptr : threads, items, [&](auto claim) {
        for (int64_t index = claim(); index >= 0; index = claim()) {
            const int64_t pair = index / runs, first = index % runs * ROWS_AT_ONCE;
            body(call, pair / call.kv_heads, pair % call.kv_heads, first,
                 std::min(ROWS_AT_ONCE, call.padded_rows - first));
        }
    });
}

void over_keys(const BackwardCall &call, const BackwardKernel &kernel, const heedful_threads *threads) {
    const int64_t blocks = (call.k_length + call.block_keys - 1) / call.block_keys, pairs = call.pairs();
    const int64_t steps = (call.rows() + call.step_rows - 1) / call.step_rows;
    const std::unique_ptr<std::atomic<int64_t>[]> position(new std::atomic<int64_t>[size_t(pairs * blocks)]);
    for (int64_t i = 0; i < pairs * blocks; ++i) position[i] = steps + 1;
    // Pairs whose bias gradient is one and the same add to it in turn: one claim holds them all. Its batch items and
    // its heads are shared or not, each by itself.
    const bool batch_shared = call.grad_bias && call.grad_bias_stride[0] == 0 && call.batch > 1;
    const bool heads_shared = call.grad_bias && call.grad_bias_stride[1] == 0 && call.kv_heads > 1;
    const int64_t batch_claims = batch_shared ? 1 : call.batch, head_claims = heads_shared ? 1 : call.kv_heads;
    const int64_t claims = batch_claims * head_claims;
    const auto run = [&](int64_t batch_index, int64_t kv_head, int64_t block, char *scratch) {
        const int64_t first = block * call.block_keys;
        Order order = {&position[(batch_index * call.kv_heads + kv_head) * blocks], block, 0};
        const BackwardItem item = {
            batch_index, kv_head,     first,      std::min(call.block_keys, call.k_length - first),
            &order,      Order::wait, Order::pass};
        kernel.run(call, item, scratch);
    };
    // Blocks first, so that pairs, which do not wait for each other, come between two blocks of one pair.
    share_out(threads, blocks * claims, [&](auto claim) {
        const ScratchBlock scratch(kernel.scratch_bytes(call));
        for (int64_t index = claim(); index >= 0; index = claim()) {
            const int64_t b = index % claims / head_claims, h = index % head_claims;
            for (int64_t batch_index = b; batch_index < (batch_shared ? call.batch : b + 1); ++batch_index)
                for (int64_t kv_head = h; kv_head < (heads_shared ? call.kv_heads : h + 1); ++kv_head)
                    run(batch_index, kv_head, index / claims, scratch.data());
        }
    });
}

void run(BackwardCall &call, const BackwardKernel &kernel, const heedful_threads *threads) {
    call.block_keys = tuned(BACKWARD_KEYS, default_block_keys(call));
    call.step_rows = tuned(BACKWARD_ROWS, kernel.step_rows);
    call.padded_rows = (call.rows() + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS * MAX_TILE_ROWS;
    const int64_t width = kernel.sum_width(call), row_count = call.pairs() * call.padded_rows;
    const bool in_place = kernel.in_place(call);
    const ScratchBlock numbers(size_t(row_count * ((in_place ? 0 : width) + 2)) * kernel.number_bytes + 64);
    call.row_lse = numbers.data();
    call.row_delta = numbers.data() + size_t(row_count) * kernel.number_bytes;
    if (in_place) {
        call.sum = call.grad_query;
        std::copy_n(call.grad_query_stride, 3, call.sum_stride);
    } else {
        // Whole vectors from a whole number of vectors on: row_count is a multiple of 24.
        call.sum = numbers.data() + size_t(row_count) * 2 * kernel.number_bytes;
        call.sum_stride[2] = width;
        call.sum_stride[1] = call.padded_rows * width;
        call.sum_stride[0] = call.kv_heads * call.sum_stride[1];
    }
    over_rows(call, threads, kernel.prepare);
    over_keys(call, kernel, threads);
    over_rows(call, threads, kernel.finish);
}

void backward(const heedful_backward &arguments, const heedful_threads *threads) {
    BackwardCall call = checked(arguments);
    const BackwardKernel &kernel = selected_tier().backward[arguments.query.dtype];
    if (call.grad_bias) {
        int64_t count = call.k_length;
        for (int axis = 0; axis < 3; ++axis) count *= arguments.features.bias.size[axis];
        std::memset(call.grad_bias, 0, size_t(count) * kernel.number_bytes);
    }
    if (call.grad_slopes)
        std::memset(call.grad_slopes, 0, size_t(call.batch * call.heads * call.q_length) * kernel.number_bytes);
    if (call.batch * call.heads == 0 || call.q_length + call.k_length == 0) return;
    const Schedule schedule(arguments.schedule, call.batch, call.heads, call.q_length, call.k_length);
    const int64_t bytes = dtype_bytes(arguments.query.dtype);
    // The bias gradient is added to by whole vectors of keys.
    for_classes(schedule, call, bytes, !call.grad_bias, [&](BackwardCall &part) {
        const auto move = [&](auto &data, int64_t *stride, int axis, int64_t first) {
            if (data) data += first * stride[axis] * bytes;
            stride[axis] *= part.step;
        };
        move(part.out, part.out_stride, 2, part.q_origin);
        move(part.grad_out, part.grad_out_stride, 2, part.q_origin);
        move(part.grad_weights, part.grad_weights_stride, 2, part.q_origin);
        move(part.grad_weights, part.grad_weights_stride, 3, part.k_origin);
        move(part.grad_query, part.grad_query_stride, 2, part.q_origin);
        move(part.grad_key, part.grad_key_stride, 2, part.k_origin);
        move(part.grad_value, part.grad_value_stride, 2, part.k_origin);
        run(part, kernel, threads);
    });
}

} // namespace
} // namespace heedful

extern "C" heedful_status heedful_attention_backward(const heedful_backward *arguments,
                                                     const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::backward(*arguments, threads); });
}
