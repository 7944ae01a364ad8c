#include "attention.h"

#include <algorithm>
#include <cstring>

#include "tensor.h"
#include "threads.h"

namespace heedful {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a bool is the first byte of its StableIValue");

template <typename T> T scalar(StableIValue value) {
    T result;
    std::memcpy(&result, &value, sizeof(T));
    return result;
}

Tensor empty_out(const heedful_tensor &query, int64_t value_dim, bool blhd) {
    const int64_t batch = query.size[0], heads = query.size[1], length = query.size[2];
    /* As torch.empty strides empty tensors, so that the fake implementation agrees. */
    const int64_t d = std::max<int64_t>(value_dim, 1), h = std::max<int64_t>(heads, 1),
                  l = std::max<int64_t>(length, 1);
    if (blhd)
        return Tensor::empty({batch, heads, length, value_dim}, {l * h * d, d, h * d, 1},
                             static_cast<heedful_dtype>(query.dtype));
    return Tensor::empty({batch, heads, length, value_dim}, {h * l * d, l * d, d, 1},
                         static_cast<heedful_dtype>(query.dtype));
}

Tensor empty_lse(const heedful_tensor &query) {
    const int64_t heads = std::max<int64_t>(query.size[1], 1), length = std::max<int64_t>(query.size[2], 1);
    return Tensor::empty({query.size[0], query.size[1], query.size[2]}, {heads * length, length, 1},
                         query.dtype == HEEDFUL_FLOAT64 ? HEEDFUL_FLOAT64 : HEEDFUL_FLOAT32);
}

void check_rank(const heedful_tensor &tensor, const char *name) {
    if (tensor.ndim != 4)
        fail(std::string(name) + " has " + std::to_string(tensor.ndim) + " dimensions, and takes 4: (B, H, L, D)");
}

} // namespace

void attention_forward(StableIValue *stack, uint64_t, uint64_t) {
    /* Every handle is owned before anything can fail. */
    const Tensor query(stack[0]), key(stack[1]), value(stack[2]);
    const List operand_list(stack[3]), schedule_list(stack[4]);
    const std::vector<Tensor> operands = operand_list.take<Tensor>();
    const std::vector<int64_t> schedule = schedule_list.take<int64_t>();
    const bool blhd = scalar<bool>(stack[6]);

    heedful_forward arguments;
    arguments.query = view(query, "query");
    arguments.key = view(key, "key");
    arguments.value = view(value, "value");
    check_rank(arguments.query, "query");
    check_rank(arguments.key, "key");
    check_rank(arguments.value, "value");
    arguments.scale = scalar<double>(stack[5]);
    std::vector<heedful_tensor> operand_views;
    operand_views.reserve(operands.size());
    for (const Tensor &operand : operands) operand_views.push_back(view(operand, "operands"));
    arguments.schedule = {schedule.data(), static_cast<int64_t>(schedule.size()), operand_views.data(),
                          static_cast<int64_t>(operand_views.size())};

    Tensor out = empty_out(arguments.query, arguments.value.size[3], blhd);
    Tensor lse = empty_lse(arguments.query);
    arguments.out = writable_view(out, "out");
    arguments.lse = writable_view(lse, "lse");

    const heedful_threads threads = torch_threads();
    if (heedful_attention_forward(&arguments, &threads) != HEEDFUL_OK)
        fail(std::string("heedful: ") + heedful_error_message());
    stack[0] = out.release();
    stack[1] = lse.release();
}

} // namespace heedful
