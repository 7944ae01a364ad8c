#include "masks.h"

#include <algorithm>

#include "arguments.h"
#include "threads.h"

namespace heedful {

heedful_tensor without_repeats(heedful_tensor mask) {
    for (int axis = 0; axis < 3; ++axis)
        if (mask.stride[axis] == 0) mask.size[axis] = 1;
    return mask;
}

void mask_band(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor mask(stack[0]);
    const heedful_tensor seen = view_of_rank_4(mask, "mask");
    heedful_tensor found;
    const int64_t items = seen.size[0];
    Tensor result = Tensor::empty({3 + 2 * items}, {1}, HEEDFUL_INT32, found);
    int32_t *const numbers = static_cast<int32_t *>(found.data);
    std::fill_n(numbers, 3 + 2 * items, 0);
    heedful_band band = {0, 0, numbers + 3, numbers + 3 + items, 0};
    const heedful_threads threads = torch_threads();
    check_status(heedful_mask_band(&seen, scalar<int64_t>(stack[1]), scalar<int64_t>(stack[2]), &band, &threads));
    numbers[0] = band.kind;
    if (band.kind != 0) {
        numbers[1] = static_cast<int32_t>(band.low);
        numbers[2] = static_cast<int32_t>(band.high);
    }
    stack[0] = result.release();
}

void mask_tiles(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor mask(stack[0]);
    const heedful_tensor seen = without_repeats(view_of_rank_4(mask, "mask"));
    const int64_t q_length = scalar<int64_t>(stack[1]), k_length = scalar<int64_t>(stack[2]),
                  tile = scalar<int64_t>(stack[3]);
    if (tile < 1) fail("mask_tiles: tile takes 1 or more");
    const int64_t rows = (seen.size[2] + tile - 1) / tile, columns = (seen.size[3] + tile - 1) / tile;
    heedful_tensor counts, full, partial, pairs;
    Tensor found[] = {Tensor::empty({3}, {1}, HEEDFUL_INT64, counts),
                      empty_4d(seen.size[0], seen.size[1], rows, columns, false, HEEDFUL_BOOL, full),
                      empty_4d(seen.size[0], seen.size[1], rows, columns, false, HEEDFUL_BOOL, partial),
                      seen.dtype == HEEDFUL_BOOL ? Tensor::empty({0}, {1}, HEEDFUL_BOOL, pairs)
                                                 : empty_4d(seen.size[0], seen.size[1], seen.size[2], seen.size[3],
                                                            false, HEEDFUL_BOOL, pairs)};
    heedful_mask_tiling tiling = {tile,
                                  static_cast<uint8_t *>(full.data),
                                  static_cast<uint8_t *>(partial.data),
                                  seen.dtype == HEEDFUL_BOOL ? nullptr : static_cast<uint8_t *>(pairs.data),
                                  0,
                                  0,
                                  0};
    const heedful_threads threads = torch_threads();
    check_status(heedful_mask_tiles(&seen, q_length, k_length, &tiling, &threads));
    const int64_t numbers[] = {tiling.kind, tiling.kind ? tiling.full_count : 0,
                               tiling.kind ? tiling.partial_count : 0};
    std::copy_n(numbers, 3, static_cast<int64_t *>(counts.data));
    for (int index = 0; index < 4; ++index) stack[index] = found[index].release();
}

} // namespace heedful
