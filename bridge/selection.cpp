#include "selection.h"

#include <algorithm>

#include "arguments.h"
#include "masks.h"

namespace heedful {
namespace {

/* The terms of a schedule; src/heedful/patterns/schedule.py has their code. */
enum : int64_t { BOUND = 0, BLOCKS = 4, MASK = 5, KEY = 1, DIAGONAL = 2, LOWER = 0, UPPER = 1, NONE = -1 };
std::vector<int64_t> bound(int64_t axis, int64_t side, int64_t value, int64_t slot = NONE) {
    return {BOUND, axis, side, value, slot, 1, NONE};
}

/* Rows and columns of tiles: a panel of the engine's rows and a few of its units of keys, so that a tile that says
 * something is not much more than what has to be looked at. */
constexpr int64_t TILE = 32;

heedful_tensor map_view(uint8_t *data, const int64_t (&size)[4]) {
    return {data,
            HEEDFUL_BOOL,
            4,
            {size[0], size[1], size[2], size[3]},
            {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1}};
}

int64_t elements(const int64_t (&size)[4]) { return size[0] * size[1] * size[2] * size[3]; }

} // namespace

Selection::Selection(const heedful_tensor &mask, bool is_causal, int64_t q_length, int64_t k_length,
                     const heedful_threads &threads)
    : is_causal_(is_causal) {
    if (mask.data == nullptr) {
        seen_ = is_causal ? Seen::causal : Seen::full;
        add_atom({});
        return;
    }
    const bool readable = mask.size[3] == k_length && (k_length == 1 || mask.stride[3] == 1);
    if (readable && read_band(mask, q_length, k_length, threads)) return;
    if (readable && mask.size[2] > 1 && read_tiles(mask, q_length, k_length, threads)) return;
    if (mask.dtype == HEEDFUL_BOOL) {
        seen_ = Seen::mask;
        add_atom({{MASK, add_operand(mask)}});
    } else {
        seen_ = Seen::bias;
        bias_ = mask;
        add_atom({});
    }
}

bool Selection::read_band(const heedful_tensor &mask, int64_t q_length, int64_t k_length,
                          const heedful_threads &threads) {
    const int64_t items = mask.size[0];
    ends_.resize(static_cast<size_t>(2 * items));
    heedful_band band = {0, 0, ends_.data(), ends_.data() + items, 0};
    check_status(heedful_mask_band(&mask, q_length, k_length, &band, &threads));
    if (band.kind == 0) return false;
    std::vector<std::vector<int64_t>> terms;
    if (band.low > 1 - q_length) terms.push_back(bound(DIAGONAL, LOWER, band.low));
    if (band.high < k_length - 1) terms.push_back(bound(DIAGONAL, UPPER, band.high));
    seen_ = terms.empty() ? is_causal_ ? Seen::causal : Seen::full : Seen::band;
    if (band.low <= 1 - q_length && band.high == 0) seen_ = Seen::causal;
    if (band.kind == 2) {
        seen_ = Seen::padded_band;
        const int64_t start = add_operand({band.start, HEEDFUL_INT32, 1, {items}, {1}});
        const int64_t stop = add_operand({band.stop, HEEDFUL_INT32, 1, {items}, {1}});
        terms.push_back(bound(KEY, LOWER, 0, start));
        terms.push_back(bound(KEY, UPPER, -1, stop));
    }
    add_atom(terms);
    return true;
}

bool Selection::read_tiles(const heedful_tensor &mask, int64_t q_length, int64_t k_length,
                           const heedful_threads &threads) {
    const heedful_tensor own = without_repeats(mask);
    if (own.size[2] == 1) return false;
    const int64_t tiles[] = {own.size[0], own.size[1], (q_length + TILE - 1) / TILE, (k_length + TILE - 1) / TILE};
    const int64_t pairs[] = {own.size[0], own.size[1], q_length, k_length};
    const bool is_bool = mask.dtype == HEEDFUL_BOOL;
    const int64_t map_bytes = elements(tiles);
    maps_.reset(new uint8_t[static_cast<size_t>(2 * map_bytes + (is_bool ? 0 : elements(pairs)))]);
    uint8_t *const full = maps_.get(), *const partial = full + map_bytes, *const counted = partial + map_bytes;
    heedful_mask_tiling tiling = {TILE, full, partial, is_bool ? nullptr : counted, 0, 0, 0};
    check_status(heedful_mask_tiles(&own, q_length, k_length, &tiling, &threads));
    if (tiling.kind == 0) return false;
    seen_ = Seen::tiles;
    if (tiling.full_count > 0) add_atom({{BLOCKS, TILE, add_operand(map_view(full, tiles))}});
    const int64_t partial_slot = add_operand(map_view(partial, tiles));
    add_atom({{BLOCKS, TILE, partial_slot}, {MASK, add_operand(is_bool ? own : map_view(counted, pairs))}});
    return true;
}

int64_t Selection::add_operand(const heedful_tensor &operand) {
    operands_.push_back(operand);
    return static_cast<int64_t>(operands_.size()) - 1;
}

void Selection::add_atom(const std::vector<std::vector<int64_t>> &terms) {
    std::vector<std::vector<int64_t>> all = terms;
    if (is_causal_) all.push_back(bound(DIAGONAL, UPPER, 0));
    if (all.empty()) return;
    if (code_.empty()) code_.push_back(0);
    ++code_[0];
    code_.push_back(static_cast<int64_t>(all.size()));
    for (const std::vector<int64_t> &term : all) code_.insert(code_.end(), term.begin(), term.end());
}

} // namespace heedful
