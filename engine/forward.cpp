// The forward entry point: checks the arguments, splits the call into items and shares them out.

#include <algorithm>
#include <vector>

#include "inputs.h"
#include "isa.h"
#include "schedule.h"
#include "scratch.h"
#include "tuning.h"
#include "workers.h"

namespace heedful {
namespace {

constexpr int64_t MAX_ITEM_ROWS = 1008, MIN_ITEM_ROWS = 96;
constexpr int64_t ITEMS_PER_THREAD = 6;
// So few rows read keys and values in place, and are split over keys.
constexpr int64_t DEFAULT_DIRECT_ROWS = 16, MAX_SPLIT_ROWS = 128;
// A quarter of the smallest L1 cache.
constexpr int64_t DEFAULT_PREFETCH_BYTES = 8 * 1024;

ForwardCall checked(const heedful_forward &arguments) {
    ForwardCall call = {};
    read_inputs(arguments.query, arguments.key, &arguments.value, arguments.scale, arguments.features, &arguments.pages,
                call);
    const int64_t o_size[] = {call.batch, call.heads, call.q_length, call.value_dim};
    check_tensor("out", arguments.out, 4, o_size, arguments.query.dtype);
    if (arguments.lse.data) check_contiguous("lse", arguments.lse, 3, o_size, statistics_dtype(arguments.query.dtype));
    call.out = static_cast<char *>(arguments.out.data);
    call.lse = arguments.lse.data;
    std::copy_n(arguments.out.stride, 4, call.out_stride);
    return call;
}

// Rows of an item: queries, outputs and running sums stay in half of the L2 cache, beside one block of keys and
// values; packing a key costs about as much as 8 rows of its products. Fewer where the threads would otherwise run
// short of items. No row's result depends on it.
int64_t item_rows(const ForwardCall &call, size_t row_bytes, int64_t threads) {
    const int64_t rows = call.rows();
    int64_t height = std::min(MAX_ITEM_ROWS, tuned(ITEM_BYTES, l2_bytes() / 2) / int64_t(row_bytes));
    if (threads > 1) {
        const int64_t wanted = (ITEMS_PER_THREAD * threads + call.pairs() - 1) / call.pairs();
        height = std::min(height, std::max(MIN_ITEM_ROWS, rows / wanted));
    }
    height = std::max<int64_t>(height, 1);
    // Evenly: a short last item would make its thread's end late.
    const int64_t count = (rows + height - 1) / height;
    height = (rows + count - 1) / count;
    return (height + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS * MAX_TILE_ROWS;
}

// Keys of a part where few rows are split over them; how long depends on the rows alone, and so do the bits.
int64_t part_keys(int64_t rows) { return 512 * ((rows + 15) / 16); }

void run_whole(const ForwardCall &call, const ForwardKernel &kernel, const heedful_threads *threads, int64_t count) {
    const int64_t rows = call.rows(), runs = (rows + call.block_rows - 1) / call.block_rows;
    // The runs of rows with the most work first.
    std::vector<int64_t> order(runs), cost(runs);
    for (int64_t run = 0; run < runs; ++run) {
        order[run] = run;
        const int64_t last = std::min(rows, (run + 1) * call.block_rows) - 1;
        if (count > 1) cost[run] = call.schedule->work(0, run * call.block_rows / call.group, last / call.group + 1);
    }
    if (runs > 1) std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
    const int64_t pairs = call.pairs();
    // Heads run fastest, so that all of them begin with their heaviest.
    share_out(threads, pairs * runs, [&](auto claim) {
        int64_t index = claim();
        if (index < 0) return;
        const ScratchBlock scratch(kernel.scratch_bytes(call));
        for (; index >= 0; index = claim()) {
            const int64_t pair = index % pairs, first = order[index / pairs] * call.block_rows;
            const ForwardItem item = {pair / call.kv_heads,
                                      pair % call.kv_heads,
                                      first,
                                      std::min(call.block_rows, rows - first),
                                      0,
                                      call.k_length,
                                      nullptr};
            kernel.run(call, item, scratch.data());
        }
    });
}

// Few rows: all of them against parts of the keys, so that one batch item's heads are enough for every core, and then
// the parts added up in order.
void run_parts(const ForwardCall &call, const ForwardKernel &kernel, const heedful_threads *threads, int64_t count) {
    const int64_t pairs = call.pairs(), rows = call.rows(), keys = part_keys(rows);
    const int64_t parts = (call.k_length + keys - 1) / keys;
    const size_t bytes = kernel.partial_bytes(call, rows);
    const ScratchBlock sums(size_t(pairs * parts) * bytes);
    // Runs of parts that follow each other, because a thread that reads on has asked for the next keys already.
    const int64_t total = pairs * parts, run = std::max<int64_t>(1, total / (4 * count));
    const auto item_of = [&](int64_t index) {
        const int64_t pair = index / parts, part = index % parts;
        return ForwardItem{pair / call.kv_heads,
                           pair % call.kv_heads,
                           0,
                           rows,
                           part * keys,
                           std::min(call.k_length, (part + 1) * keys),
                           sums.data() + size_t(index) * bytes};
    };
    share_out(threads, (total + run - 1) / run, [&](auto claim) {
        int64_t index = claim();
        if (index < 0) return;
        const ScratchBlock scratch(kernel.scratch_bytes(call));
        for (; index >= 0; index = claim())
            for (int64_t i = index * run; i < std::min(total, (index + 1) * run); ++i)
                kernel.run(call, item_of(i), scratch.data());
    });
    share_out(threads, pairs * rows * call.value_dim * parts < (1 << 16) ? 1 : pairs, [&](auto claim) {
        const ScratchBlock scratch(kernel.scratch_bytes(call));
        const bool alone = pairs * rows * call.value_dim * parts < (1 << 16);
        for (int64_t index = claim(); index >= 0; index = claim())
            for (int64_t pair = index; pair < (alone ? pairs : index + 1); ++pair)
                kernel.merge(call, item_of(pair * parts), sums.data() + size_t(pair * parts) * bytes, parts,
                             scratch.data());
    });
}

void run(ForwardCall &call, const ForwardKernel &kernel, const heedful_threads *threads) {
    const int64_t count = threads && threads->run ? threads->count : 1, rows = call.rows();
    call.direct = rows <= tuned(DIRECT_ROWS, DEFAULT_DIRECT_ROWS) && call.key_stride[3] == 1 &&
                  (call.value_stride[3] == 1 || call.value_dim == 1);
    call.prefetch_bytes = tuned(PREFETCH_BYTES, DEFAULT_PREFETCH_BYTES);
    if (rows <= MAX_SPLIT_ROWS && call.k_length > part_keys(rows)) {
        call.block_rows = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS * MAX_TILE_ROWS;
        run_parts(call, kernel, threads, count);
    } else {
        call.block_rows = item_rows(call, kernel.row_bytes(call), count);
        run_whole(call, kernel, threads, count);
    }
}

void forward(const heedful_forward &arguments, const heedful_threads *threads) {
    ForwardCall call = checked(arguments);
    if (call.batch * call.heads * call.q_length == 0) return;
    const Schedule schedule(arguments.schedule, call.batch, call.heads, call.q_length, call.k_length);
    const ForwardKernel &kernel = selected_tier().forward[arguments.query.dtype];
    const int64_t bytes = dtype_bytes(arguments.query.dtype);
    for_classes(schedule, call, bytes, true, [&](ForwardCall &part) {
        part.out += part.q_origin * part.out_stride[2] * bytes;
        part.out_stride[2] *= part.step;
        if (part.q_length) run(part, kernel, threads);
    });
}

} // namespace
} // namespace heedful

extern "C" heedful_status heedful_attention_forward(const heedful_forward *arguments, const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::forward(*arguments, threads); });
}
