/* Launches of kernels that were compiled elsewhere, put together once and repeated: a call looks at its tensors,
 * allocates, writes pointers into the kernels' arguments and launches. */
#ifndef HEEDFUL_BRIDGE_LAUNCHES_H
#define HEEDFUL_BRIDGE_LAUNCHES_H

#include "torch_shim.h"

namespace heedful {

/* code: int64 (n), as src/heedful/backend/triton/kept.py writes it: what tensors a call must have, what it allocates,
 * and its launches. place: what an earlier call returned, whose forms are then tried before this one; 0 begins another.
 * -1 where the driver is not there or the kernel has other parameters than the code says. */
constexpr const char *launches_keep_schema = "launches_keep(Tensor code, int place) -> int";
/* place: int64 (1). */
constexpr const char *launches_forget_schema = "launches_forget(Tensor place) -> ()";
/* The tensors that the form allocates for its caller; nothing, and no launch, where no form at this place takes these
 * tensors or their device is not the current one. On the device's current stream. */
constexpr const char *launches_run_schema = "launches_run(Tensor[] tensors, int place) -> Tensor[]";
/* The same of three tensors and one result: without lists half a microsecond less. */
constexpr const char *launches_run_one_schema =
    "launches_run_one(Tensor query, Tensor key, Tensor value, int place) -> Tensor?";
/* Seconds that launching alone takes, so many times over. */
constexpr const char *launches_time_schema = "launches_time(Tensor[] tensors, int place, int times) -> float";

void launches_keep(StableIValue *stack, uint64_t argument_count, uint64_t result_count);
void launches_forget(StableIValue *stack, uint64_t argument_count, uint64_t result_count);
void launches_run(StableIValue *stack, uint64_t argument_count, uint64_t result_count);
void launches_run_one(StableIValue *stack, uint64_t argument_count, uint64_t result_count);
void launches_time(StableIValue *stack, uint64_t argument_count, uint64_t result_count);

} // namespace heedful

#endif
