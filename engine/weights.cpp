// The entry point for weights that a caller wants to see.

#include <algorithm>

#include "inputs.h"
#include "isa.h"
#include "schedule.h"
#include "scratch.h"
#include "workers.h"

namespace heedful {
namespace {

void weights(const heedful_weights &arguments, const heedful_threads *threads) {
    WeightsCall call = {};
    read_inputs(arguments.query, arguments.key, nullptr, arguments.scale, arguments.features, nullptr, call);
    const int32_t dtype = arguments.query.dtype;
    const int64_t size[] = {call.batch, call.heads, call.q_length, call.k_length};
    const bool lists = !arguments.weights.data && arguments.values.data;
    if (!arguments.weights.data && !lists) {
        check_contiguous("counts", arguments.counts, 3, size, HEEDFUL_INT64);
        call.counts = static_cast<int64_t *>(arguments.counts.data);
    } else {
        check_contiguous("lse", arguments.lse, 3, size, statistics_dtype(dtype));
        call.lse = arguments.lse.data;
    }
    if (arguments.weights.data) {
        check_tensor("weights", arguments.weights, 4, size, dtype);
        call.weights = static_cast<char *>(arguments.weights.data);
        std::copy_n(arguments.weights.stride, 4, call.weights_stride);
    }
    if (lists) {
        const int64_t count = arguments.values.ndim == 1 ? arguments.values.size[0] : -1;
        const int64_t list_size[] = {4, count};
        check_contiguous("values", arguments.values, 1, &count, dtype);
        check_tensor("indices", arguments.indices, 2, list_size, HEEDFUL_INT64);
        REQUIRE(count <= 1 || arguments.indices.stride[1] == 1, "indices: must have stride 1 along the pairs");
        check_contiguous("row_begin", arguments.row_begin, 3, size, HEEDFUL_INT64);
        call.values = static_cast<char *>(arguments.values.data);
        call.indices = static_cast<int64_t *>(arguments.indices.data);
        call.indices_stride = arguments.indices.stride[0];
        call.row_begin = static_cast<const int64_t *>(arguments.row_begin.data);
    }
    if (call.batch * call.heads * call.q_length == 0) return;
    const Schedule schedule(arguments.schedule, call.batch, call.heads, call.q_length, call.k_length);
    call.schedule = &schedule;
    const WeightsKernel &kernel = selected_tier().weights[dtype];
    const int64_t rows = call.rows(), runs = (rows + WEIGHT_ROWS - 1) / WEIGHT_ROWS;
    share_out(threads, call.pairs() * runs, [&](auto claim) {
        const ScratchBlock scratch(kernel.scratch_bytes(call));
        for (int64_t index = claim(); index >= 0; index = claim()) {
            const int64_t pair = index / runs, first = index % runs * WEIGHT_ROWS;
            const ForwardItem item = {pair / call.kv_heads,
                                      pair % call.kv_heads,
                                      first,
                                      std::min(WEIGHT_ROWS, rows - first),
                                      0,
                                      call.k_length,
                                      nullptr};
            kernel.run(call, item, scratch.data());
        }
    });
}

} // namespace
} // namespace heedful

extern "C" heedful_status heedful_attention_weights(const heedful_weights *arguments, const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::weights(*arguments, threads); });
}
