// The forward entry point: checks the arguments, splits the call into items and shares them out.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "error.h"
#include "isa.h"
#include "schedule.h"
#include "scratch.h"

namespace heedful {
namespace {

constexpr int64_t MAX_HEAD_DIM = 256;
// Queries, outputs and running sums of an item stay in half of a 1 MiB L2, beside one block of keys and
// values; packing a key costs about as much as 8 rows of its products.
constexpr int64_t ITEM_BYTES = 512 * 1024;
constexpr int64_t MAX_ITEM_ROWS = 1008, MIN_ITEM_ROWS = 96;
constexpr int64_t ITEMS_PER_THREAD = 6;

void check_tensor(const char *name, const heedful_tensor &tensor, int32_t ndim, const int64_t *size, int32_t dtype) {
    const auto wrong = [name](const char *what, int64_t got, int64_t takes) {
        return std::string(name) + ": has " + std::to_string(got) + " as " + what + ", takes " + std::to_string(takes);
    };
    REQUIRE(tensor.ndim == ndim, wrong("number of dimensions", tensor.ndim, ndim));
    REQUIRE(tensor.dtype == dtype, wrong("dtype code", tensor.dtype, dtype));
    int64_t count = 1;
    for (int axis = 0; axis < ndim; ++axis) {
        REQUIRE(tensor.size[axis] == size[axis], wrong("a size", tensor.size[axis], size[axis]));
        count *= size[axis];
    }
    REQUIRE(tensor.data || count == 0, std::string(name) + ": has no data");
}

ForwardCall checked(const heedful_forward &arguments) {
    const heedful_tensor &query = arguments.query, &key = arguments.key, &value = arguments.value;
    REQUIRE(query.dtype >= HEEDFUL_FLOAT32 && query.dtype <= HEEDFUL_FLOAT64,
            "query: has dtype code " + std::to_string(query.dtype) + ", takes float32, bfloat16, float16 or float64");
    REQUIRE(query.ndim == 4 && key.ndim == 4 && value.ndim == 4, "query, key, value: take 4 dimensions each");
    for (const heedful_tensor *tensor : {&query, &key, &value})
        for (int64_t size : tensor->size) REQUIRE(size >= 0, "query, key, value: a size is negative");
    ForwardCall call = {};
    call.batch = query.size[0];
    call.heads = query.size[1];
    call.q_length = query.size[2];
    call.head_dim = query.size[3];
    call.kv_heads = key.size[1];
    call.k_length = key.size[2];
    call.value_dim = value.size[3];
    REQUIRE(call.heads == 0 || (call.kv_heads > 0 && call.heads % call.kv_heads == 0),
            "key: has " + std::to_string(call.kv_heads) + " heads, which do not divide query's " +
                std::to_string(call.heads));
    for (int64_t dim : {call.head_dim, call.value_dim})
        if (dim < 1 || dim > MAX_HEAD_DIM)
            throw Error(HEEDFUL_UNSUPPORTED,
                        "head dim: is " + std::to_string(dim) + ", takes 1 to " + std::to_string(MAX_HEAD_DIM));
    const int64_t q_size[] = {call.batch, call.heads, call.q_length, call.head_dim};
    const int64_t k_size[] = {call.batch, call.kv_heads, call.k_length, call.head_dim};
    const int64_t v_size[] = {call.batch, call.kv_heads, call.k_length, call.value_dim};
    const int64_t o_size[] = {call.batch, call.heads, call.q_length, call.value_dim};
    check_tensor("query", query, 4, q_size, query.dtype);
    check_tensor("key", key, 4, k_size, query.dtype);
    check_tensor("value", value, 4, v_size, query.dtype);
    check_tensor("out", arguments.out, 4, o_size, query.dtype);
    if (arguments.lse.data) {
        check_tensor("lse", arguments.lse, 3, o_size,
                     query.dtype == HEEDFUL_FLOAT64 ? HEEDFUL_FLOAT64 : HEEDFUL_FLOAT32);
        const int64_t *stride = arguments.lse.stride;
        REQUIRE(stride[2] == 1 && stride[1] == call.q_length && stride[0] == call.heads * call.q_length,
                "lse: must be contiguous");
    }
    REQUIRE(std::isfinite(arguments.scale), "scale: is not finite");
    call.group = call.kv_heads ? call.heads / call.kv_heads : 1;
    call.query = static_cast<const char *>(query.data);
    call.key = static_cast<const char *>(key.data);
    call.value = static_cast<const char *>(value.data);
    call.out = static_cast<char *>(arguments.out.data);
    call.lse = arguments.lse.data;
    std::copy_n(query.stride, 4, call.query_stride);
    std::copy_n(key.stride, 4, call.key_stride);
    std::copy_n(value.stride, 4, call.value_stride);
    std::copy_n(arguments.out.stride, 4, call.out_stride);
    call.scale = arguments.scale;
    return call;
}

// Rows of an item: as many as the cache holds, fewer where the threads would otherwise run short of items.
// No row's result depends on it.
int64_t item_rows(const ForwardCall &call, size_t row_bytes, int64_t threads) {
    const int64_t rows = call.q_length * call.group;
    int64_t height = std::min(MAX_ITEM_ROWS, ITEM_BYTES / int64_t(row_bytes));
    if (threads > 1) {
        const int64_t wanted =
            (ITEMS_PER_THREAD * threads + call.batch * call.kv_heads - 1) / (call.batch * call.kv_heads);
        height = std::min(height, std::max(MIN_ITEM_ROWS, rows / wanted));
    }
    // Evenly: a short last item would make its thread's end late.
    const int64_t count = (rows + height - 1) / height;
    height = (rows + count - 1) / count;
    return (height + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS * MAX_TILE_ROWS;
}

struct Work {
    const ForwardCall *call;
    const ForwardKernel *kernel;
    std::vector<int64_t> order; // of the runs of rows, the most work first
    std::atomic<int64_t> next{0};
    std::atomic<int> status{HEEDFUL_OK};

    // Claims items until there are none. Heads run fastest, so that all of them begin with their heaviest.
    void serve() {
        const heedful_status result = guarded([this] {
            const int64_t pairs = call->batch * call->kv_heads, total = pairs * int64_t(order.size());
            const int64_t rows = call->q_length * call->group;
            int64_t index = next.fetch_add(1);
            if (index >= total) return;
            const ScratchBlock scratch(kernel->scratch_bytes(*call));
            for (; index < total; index = next.fetch_add(1)) {
                const int64_t pair = index % pairs, first = order[index / pairs] * call->block_rows;
                const ForwardItem item = {pair / call->kv_heads, pair % call->kv_heads, first,
                                          std::min(call->block_rows, rows - first)};
                kernel->run(*call, item, scratch.data());
            }
        });
        if (result != HEEDFUL_OK) status = result;
    }
};

void forward(const heedful_forward &arguments, const heedful_threads *threads) {
    ForwardCall call = checked(arguments);
    if (call.batch * call.heads * call.q_length == 0) return;
    const Schedule schedule(arguments.schedule, call.batch, call.q_length, call.k_length);
    call.schedule = &schedule;
    const ForwardKernel &kernel = selected_tier().forward[arguments.query.dtype];
    const int64_t count = threads && threads->run ? threads->count : 1;
    call.block_rows = item_rows(call, kernel.row_bytes(call), count);

    Work work;
    work.call = &call;
    work.kernel = &kernel;
    const int64_t rows = call.q_length * call.group, runs = (rows + call.block_rows - 1) / call.block_rows;
    std::vector<int64_t> cost(runs);
    for (int64_t run = 0; run < runs; ++run) {
        work.order.push_back(run);
        const int64_t last = std::min(rows, (run + 1) * call.block_rows) - 1;
        if (count > 1) cost[run] = schedule.work(0, run * call.block_rows / call.group, last / call.group + 1);
    }
    std::stable_sort(work.order.begin(), work.order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });

    const int64_t workers = std::min(count, runs * call.batch * call.kv_heads);
    if (workers > 1) {
        threads->run(
            threads->pool, workers, [](void *argument, int64_t) { static_cast<Work *>(argument)->serve(); }, &work);
    } else {
        work.serve();
    }
    if (work.status == HEEDFUL_OUT_OF_MEMORY) throw std::bad_alloc();
    if (work.status != HEEDFUL_OK) throw Error(heedful_status(work.status.load()), "a worker thread failed");
}

} // namespace
} // namespace heedful

extern "C" heedful_status heedful_attention_forward(const heedful_forward *arguments, const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::forward(*arguments, threads); });
}
