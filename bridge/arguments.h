/* What the operators have in common: reading their arguments, and outputs in torch's shapes. */
#ifndef HEEDFUL_BRIDGE_ARGUMENTS_H
#define HEEDFUL_BRIDGE_ARGUMENTS_H

#include <cstring>
#include <vector>

#include "tensor.h"

namespace heedful {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a bool is the first byte of its StableIValue");

template <typename T> T scalar(StableIValue value) {
    T result;
    std::memcpy(&result, &value, sizeof(T));
    return result;
}

/* Owns the schedule that an operator was passed. */
class Schedule {
  public:
    Schedule(StableIValue operands, StableIValue code);

    /* Refers to this object. Fails on an operand that the engine cannot read. */
    heedful_schedule view();

  private:
    std::vector<Tensor> operands_;
    std::vector<int64_t> code_;
    std::vector<heedful_tensor> views_;
};

/* The view of a tensor of 4 dimensions; fails by name on any other. */
heedful_tensor view_of_rank_4(const Tensor &tensor, const char *name);
/* As view, and one whose data is NULL for a tensor that is absent. */
heedful_tensor optional_view(const Tensor &tensor, const char *name);

/* The dropout of a call; fails where there is one and no seed. */
void set_dropout(heedful_features &features, double dropout_p, const Tensor &seed);

/* The dtype of lse and of the other statistics. */
heedful_dtype statistics_dtype(const heedful_tensor &query);
/* Uninitialised, contiguous (B, H, Lq) of query's sizes, and its view. */
Tensor empty_per_row(const heedful_tensor &query, heedful_dtype dtype, heedful_tensor &view);
/* Uninitialised (B, H, L, D), in (B, L, H, D) memory order where blhd, and its view. */
Tensor empty_4d(int64_t batch, int64_t heads, int64_t length, int64_t dim, bool blhd, heedful_dtype dtype,
                heedful_tensor &view);

/* Of an int64 CPU tensor of one element; fails by name on any other. */
int64_t only_element(const Tensor &tensor, const char *name);

/* Raises the engine's message in Python unless the status is good. */
void check_status(heedful_status status);

} // namespace heedful

#endif
