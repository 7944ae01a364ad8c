// Arguments as a caller gave them, checked and brought into what the kernels read.
#pragma once

#include <algorithm>
#include <string>

#include "heedful.h"
#include "kernels/tier.h"
#include "schedule.h"

namespace heedful {

constexpr int64_t MAX_HEAD_DIM = 512;

// Throws InvalidArgument unless the tensor has these sizes and this dtype.
void check_tensor(const char *name, const heedful_tensor &tensor, int32_t ndim, const int64_t *size, int32_t dtype);
// The same, and contiguous.
void check_contiguous(const char *name, const heedful_tensor &tensor, int32_t ndim, const int64_t *size, int32_t dtype);

// FLOAT64 for FLOAT64 inputs, FLOAT32 for all others.
inline int32_t statistics_dtype(int32_t dtype) { return dtype == HEEDFUL_FLOAT64 ? HEEDFUL_FLOAT64 : HEEDFUL_FLOAT32; }

// Fills what all calls share, save the schedule. value may be null.
void read_inputs(const heedful_tensor &query, const heedful_tensor &key, const heedful_tensor *value, double scale,
                 const heedful_features &features, const heedful_tensor *pages, Inputs &inputs);

inline int64_t dtype_bytes(int32_t dtype) { return dtype == HEEDFUL_FLOAT32 ? 4 : dtype == HEEDFUL_FLOAT64 ? 8 : 2; }

// Narrows a call to every step-th query and key: those of one class each.
void stride_inputs(int64_t query_class, int64_t key_class, int64_t step, Inputs &inputs, int64_t number_bytes);

// Fewer keys to a class than this are not worth a call of their own.
constexpr int64_t MIN_CLASS_KEYS = 16;

// Runs a call whole, or, where its pairs have a common step, class by class: a dilated window then costs what it
// attends to and not what it spans. run(call) gets the call with its inputs and schedule narrowed.
template <class Call, class Run>
void for_classes(const Schedule &schedule, Call &call, int64_t number_bytes, bool divisible, Run run) {
    int64_t residue = 0;
    const int64_t step = divisible && !call.pages.table ? schedule.common_step(residue) : 1;
    if (step == 1 || call.k_length < MIN_CLASS_KEYS * step) {
        call.schedule = &schedule;
        run(call);
        return;
    }
    for (int64_t query_class = 0; query_class < step; ++query_class) {
        const int64_t key_class = (query_class + residue) % step;
        Call part = call;
        stride_inputs(query_class, key_class, step, part, number_bytes);
        const Schedule own(schedule, step, query_class, key_class, part.q_length, part.k_length);
        part.schedule = &own;
        run(part);
    }
}

} // namespace heedful
