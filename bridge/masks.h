/* Dense masks read once, as operators and for the hook behind PyTorch's attention: heedful.h has what is found. */
#ifndef HEEDFUL_BRIDGE_MASKS_H
#define HEEDFUL_BRIDGE_MASKS_H

#include "tensor.h"
#include "torch_shim.h"

namespace heedful {

/* mask (B, H, Lq, Lk), B, H and Lq may be 1. int32 (3 + 2 B): kind, low, high, each item's start, each item's stop. */
constexpr const char *mask_band_schema = "mask_band(Tensor mask, int q_length, int k_length) -> Tensor";

/* counts int64 (3): kind, full tiles, partial tiles. full and partial bool (B, H, rows of tiles, columns of tiles).
 * pairs bool, the pairs of a float mask that count, and (0) for a bool mask. B, H and Lq are 1 where the mask repeats
 * them without memory of their own. */
constexpr const char *mask_tiles_schema = "mask_tiles(Tensor mask, int q_length, int k_length, int tile) -> "
                                          "(Tensor counts, Tensor full, Tensor partial, Tensor pairs)";

void mask_band(StableIValue *stack, uint64_t argument_count, uint64_t result_count);
void mask_tiles(StableIValue *stack, uint64_t argument_count, uint64_t result_count);

/* The mask with size 1 where B, H or Lq have stride 0. */
heedful_tensor without_repeats(heedful_tensor mask);

} // namespace heedful

#endif
