#include "attention.h"

#include "arguments.h"
#include "threads.h"

namespace heedful {

void attention_forward(StableIValue *stack, uint64_t, uint64_t) {
    /* Every handle is owned before anything can fail. */
    const Tensor query(stack[0]), key(stack[1]), value(stack[2]);
    const Tensor bias = Tensor::optional(stack[7]), alibi_slopes = Tensor::optional(stack[8]),
                 sinks = Tensor::optional(stack[9]), seed = Tensor::optional(stack[12]),
                 pages = Tensor::optional(stack[13]), query_offset = Tensor::optional(stack[14]);
    Schedule schedule(stack[3], stack[4]);
    const bool blhd = scalar<bool>(stack[6]);

    heedful_forward arguments;
    arguments.query = view_of_rank_4(query, "query");
    arguments.key = view_of_rank_4(key, "key");
    arguments.value = view_of_rank_4(value, "value");
    arguments.scale = scalar<double>(stack[5]);
    arguments.schedule = schedule.view();
    arguments.features.bias = optional_view(bias, "bias");
    arguments.features.alibi_slopes = optional_view(alibi_slopes, "alibi_slopes");
    arguments.features.query_offset = optional_view(query_offset, "query_offset");
    arguments.features.sinks = optional_view(sinks, "sinks");
    arguments.features.softcap = scalar<double>(stack[10]);
    set_dropout(arguments.features, scalar<double>(stack[11]), seed);
    arguments.pages = optional_view(pages, "pages");
    /* Without an entry its data may be NULL, which would mean that there are no pages. */
    if (pages.get() != nullptr && arguments.pages.data == nullptr) fail("pages has no element, and takes (B, n)");

    const heedful_tensor &q = arguments.query;
    Tensor out = empty_4d(q.size[0], q.size[1], q.size[2], arguments.value.size[3], blhd,
                          static_cast<heedful_dtype>(q.dtype), arguments.out);
    Tensor lse = empty_per_row(q, statistics_dtype(q), arguments.lse);

    const heedful_threads threads = torch_threads();
    check_status(heedful_attention_forward(&arguments, &threads));
    stack[0] = out.release();
    stack[1] = lse.release();
}

} // namespace heedful
