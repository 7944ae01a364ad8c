#include <algorithm>

#include "arguments.h"
#include "attention.h"
#include "threads.h"

namespace heedful {
namespace {

/* Owns the arguments of both operators; outputs are left out until they are set. */
class Weights {
  public:
    explicit Weights(StableIValue *stack)
        : query_(stack[0]), key_(stack[1]), lse_(stack[2]), bias_(Tensor::optional(stack[6])),
          alibi_slopes_(Tensor::optional(stack[7])), seed_(Tensor::optional(stack[10])),
          query_offset_(Tensor::optional(stack[11])), schedule_(stack[3], stack[4]) {
        arguments.query = view_of_rank_4(query_, "query");
        arguments.key = view_of_rank_4(key_, "key");
        arguments.lse = view(lse_, "lse");
        arguments.scale = scalar<double>(stack[5]);
        arguments.schedule = schedule_.view();
        arguments.features.bias = optional_view(bias_, "bias");
        arguments.features.alibi_slopes = optional_view(alibi_slopes_, "alibi_slopes");
        arguments.features.query_offset = optional_view(query_offset_, "query_offset");
        arguments.features.softcap = scalar<double>(stack[8]);
        set_dropout(arguments.features, scalar<double>(stack[9]), seed_);
    }

    void run() {
        const heedful_threads threads = torch_threads();
        check_status(heedful_attention_weights(&arguments, &threads));
    }

    heedful_weights arguments = {};

  private:
    const Tensor query_, key_, lse_, bias_, alibi_slopes_, seed_, query_offset_;
    Schedule schedule_;
};

/* Turns counts into where each begins; returns their sum. */
int64_t exclusive_sums(int64_t *counts, int64_t length) {
    int64_t sum = 0;
    for (int64_t index = 0; index < length; ++index) {
        const int64_t count = counts[index];
        counts[index] = sum;
        sum += count;
    }
    return sum;
}

} // namespace

void attention_weights(StableIValue *stack, uint64_t, uint64_t) {
    Weights call(stack);
    const heedful_tensor &query = call.arguments.query;
    Tensor weights = empty_4d(query.size[0], query.size[1], query.size[2], call.arguments.key.size[2], false,
                              static_cast<heedful_dtype>(query.dtype), call.arguments.weights);
    if (call.arguments.weights.data != nullptr) call.run();
    stack[0] = weights.release();
}

void attention_weights_sparse(StableIValue *stack, uint64_t, uint64_t) {
    Weights call(stack);
    const heedful_tensor &query = call.arguments.query;
    heedful_tensor rows;
    const Tensor row_begin = empty_per_row(query, HEEDFUL_INT64, rows);
    int64_t total = 0;
    if (rows.data != nullptr) {
        call.arguments.counts = rows;
        call.run();
        call.arguments.counts = {};
        total = exclusive_sums(static_cast<int64_t *>(rows.data), query.size[0] * query.size[1] * query.size[2]);
    }
    Tensor indices = Tensor::empty({4, total}, {std::max<int64_t>(total, 1), 1}, HEEDFUL_INT64, call.arguments.indices);
    Tensor values = Tensor::empty({total}, {1}, static_cast<heedful_dtype>(query.dtype), call.arguments.values);
    call.arguments.row_begin = rows;
    if (total > 0) call.run();
    stack[0] = indices.release();
    stack[1] = values.release();
}

} // namespace heedful
