#include "arguments.h"

#include <algorithm>

namespace heedful {

Schedule::Schedule(StableIValue operands, StableIValue code) {
    const List operand_list(operands), code_list(code);
    operands_ = operand_list.take<Tensor>();
    code_ = code_list.take<int64_t>();
}

heedful_schedule Schedule::view() {
    views_.clear();
    views_.reserve(operands_.size());
    for (const Tensor &operand : operands_) views_.push_back(heedful::view(operand, "operands"));
    return {code_.data(), static_cast<int64_t>(code_.size()), views_.data(), static_cast<int64_t>(views_.size())};
}

heedful_tensor view_of_rank_4(const Tensor &tensor, const char *name) {
    const heedful_tensor result = view(tensor, name);
    if (result.ndim != 4)
        fail(std::string(name) + " has " + std::to_string(result.ndim) + " dimensions, and takes 4: (B, H, L, D)");
    return result;
}

heedful_tensor optional_view(const Tensor &tensor, const char *name) {
    if (tensor.get() != nullptr) return view(tensor, name);
    heedful_tensor absent = {};
    return absent;
}

void set_dropout(heedful_features &features, double dropout_p, const Tensor &seed) {
    features.dropout_p = dropout_p;
    features.seed = 0;
    if (seed.get() == nullptr) {
        if (dropout_p != 0) fail("seed is None, and dropout takes an int64 tensor of one element");
        return;
    }
    const heedful_tensor words = view(seed, "seed");
    if (words.dtype != HEEDFUL_INT64 || words.ndim != 1 || words.size[0] != 1)
        fail("seed takes an int64 tensor of one element");
    std::memcpy(&features.seed, words.data, sizeof features.seed);
}

heedful_dtype statistics_dtype(const heedful_tensor &query) {
    return query.dtype == HEEDFUL_FLOAT64 ? HEEDFUL_FLOAT64 : HEEDFUL_FLOAT32;
}

/* Strides as torch.empty gives empty tensors, so that the fake implementations agree. */
Tensor empty_per_row(const heedful_tensor &query, heedful_dtype dtype, heedful_tensor &view) {
    const int64_t heads = std::max<int64_t>(query.size[1], 1), length = std::max<int64_t>(query.size[2], 1);
    return Tensor::empty({query.size[0], query.size[1], query.size[2]}, {heads * length, length, 1}, dtype, view);
}

Tensor empty_4d(int64_t batch, int64_t heads, int64_t length, int64_t dim, bool blhd, heedful_dtype dtype,
                heedful_tensor &view) {
    const int64_t d = std::max<int64_t>(dim, 1), h = std::max<int64_t>(heads, 1), l = std::max<int64_t>(length, 1);
    if (blhd) return Tensor::empty({batch, heads, length, dim}, {l * h * d, d, h * d, 1}, dtype, view);
    return Tensor::empty({batch, heads, length, dim}, {h * l * d, l * d, d, 1}, dtype, view);
}

int64_t only_element(const Tensor &tensor, const char *name) {
    const heedful_tensor seen = view(tensor, name);
    if (seen.dtype != HEEDFUL_INT64 || seen.size[0] != 1)
        fail(std::string(name) + " takes an int64 tensor of one element");
    return *static_cast<const int64_t *>(seen.data);
}

void check_status(heedful_status status) {
    if (status != HEEDFUL_OK) fail(std::string("heedful: ") + heedful_error_message());
}

} // namespace heedful
