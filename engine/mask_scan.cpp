// Reading a dense mask once: the band that it may be, or which of its tiles say anything.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "workers.h"

namespace heedful {
namespace {

constexpr int64_t UNLIMITED = int64_t(1) << 40;
// What a thread claims at once: enough to be worth it, and little enough to stay in its cache.
constexpr int64_t ITEM_BYTES = 256 << 10;
constexpr int64_t RUN = 64;

// How a type of mask says that a pair counts or that it is excluded; a float may say neither. A finite number is far
// below all others when no score can make up for it: its weight is 0 in a row where something counts, but not in a row
// of nothing else, where all weights are equal.
struct Bool {
    typedef uint8_t Element;
    static bool counts(Element x) { return x != 0; }
    static bool excluded(Element x) { return x == 0; }
    static bool infinite(Element) { return true; }
};
struct Float32 {
    typedef float Element;
    static bool counts(Element x) { return x == 0; }
    static bool excluded(Element x) { return x <= -1e30f; }
    static bool infinite(Element x) { return x < -std::numeric_limits<float>::max(); }
};
struct Float64 {
    typedef double Element;
    static bool counts(Element x) { return x == 0; }
    static bool excluded(Element x) { return x <= -1e30; }
    static bool infinite(Element x) { return x < -std::numeric_limits<double>::max(); }
};
struct BFloat16 {
    typedef uint16_t Element;
    static bool counts(Element x) { return (x & 0x7fff) == 0; }
    static bool excluded(Element x) { return x >= 0xf14a && x <= 0xff80; } // -1e30 to -inf
    static bool infinite(Element x) { return x == 0xff80; }
};
struct Float16 {
    typedef uint16_t Element;
    static bool counts(Element x) { return (x & 0x7fff) == 0; }
    static bool excluded(Element x) { return x == 0xfc00; } // no finite one is small enough
    static bool infinite(Element) { return true; }
};

template <class Body> void with_kind(int32_t dtype, Body body) {
    switch (dtype) {
    case HEEDFUL_BOOL:
        return body(Bool());
    case HEEDFUL_FLOAT32:
        return body(Float32());
    case HEEDFUL_BFLOAT16:
        return body(BFloat16());
    case HEEDFUL_FLOAT16:
        return body(Float16());
    case HEEDFUL_FLOAT64:
        return body(Float64());
    }
    throw Error(HEEDFUL_INVALID_ARGUMENT, "mask: has dtype code " + std::to_string(dtype) + ", takes BOOL or a float");
}

// A mask's own items, heads and rows: an axis of one element that is repeated is read once.
struct Mask {
    int64_t items, heads, rows, keys, stride[4];
    const char *data;

    Mask(const heedful_tensor &mask, int64_t q_length, int64_t k_length) : data(static_cast<const char *>(mask.data)) {
        REQUIRE(mask.ndim == 4, "mask: must have 4 dimensions");
        REQUIRE(q_length >= 1 && k_length >= 1, "q_length, k_length: take 1 or more");
        REQUIRE(q_length < INT32_MAX && k_length < INT32_MAX, "q_length, k_length: take less than 2^31 - 1");
        int64_t *const size[] = {&items, &heads, &rows, &keys};
        const int64_t wanted[] = {mask.size[0], mask.size[1], q_length, k_length};
        for (int axis = 0; axis < 4; ++axis) {
            REQUIRE(mask.size[axis] >= 1 && (mask.size[axis] == 1 || mask.size[axis] == wanted[axis]),
                    "mask: axis " + std::to_string(axis) + " has size " + std::to_string(mask.size[axis]) +
                        ", takes 1 or " + std::to_string(wanted[axis]));
            stride[axis] = mask.size[axis] == 1 ? 0 : mask.stride[axis];
            *size[axis] = stride[axis] == 0 && axis < 3 ? 1 : mask.size[axis];
        }
        REQUIRE(mask.data, "mask: has no data");
        REQUIRE(mask.size[3] == k_length && (k_length == 1 || stride[3] == 1), "mask: keys must lie side by side");
    }
    int64_t planes() const { return items * heads; }
    template <class Kind> const typename Kind::Element *row(int64_t plane, int64_t i) const {
        return reinterpret_cast<const typename Kind::Element *>(data) + plane / heads * stride[0] +
               plane % heads * stride[1] + i * stride[2];
    }
};

template <class Test, class Element> int64_t end_of_run(const Element *row, int64_t from, int64_t to, Test holds) {
    for (; from + RUN <= to; from += RUN) {
        Element other = 0;
        for (int64_t k = 0; k < RUN; ++k) other = holds(row[from + k]) ? other : Element(1);
        if (other != 0) break;
    }
    while (from < to && holds(row[from])) ++from;
    return from;
}

struct Interval {
    int32_t begin, end; // equal where the row is empty
};

// False where the keys of a row that count are no interval, or where an element says neither.
template <class Kind> bool read_row(const typename Kind::Element *row, int64_t keys, Interval &found) {
    const int64_t begin = end_of_run(row, 0, keys, Kind::excluded);
    if (begin == keys) {
        found = {0, 0};
        return end_of_run(row, 0, keys, Kind::infinite) == keys;
    }
    const int64_t end = end_of_run(row, begin, keys, Kind::counts);
    found = {int32_t(begin), int32_t(end)};
    return end > begin && end_of_run(row, end, keys, Kind::excluded) == keys;
}

struct Band {
    int64_t low = -UNLIMITED, high = UNLIMITED;

    bool gives(const Interval &found, int64_t i, int64_t start, int64_t stop) const {
        const int64_t begin = std::max(start, i + low), end = std::min(stop, i + high + 1);
        if (found.begin == found.end) return begin >= end;
        return begin == found.begin && end == found.end;
    }
};

// The rows of one plane that see anything, and the limits of the band that they show: an end that moves from row to
// row is the band's, and so is one at which rows turn empty.
struct Plane {
    const Interval *rows;
    int64_t count, first, last;

    Plane(const Interval *rows, int64_t count) : rows(rows), count(count), first(0), last(count - 1) {
        while (first < count && empty(first)) ++first;
        while (last > first && empty(last)) --last;
    }
    bool nothing() const { return first == count; }
    void limit(Band &band) const {
        if (nothing()) return;
        const Interval top = rows[first], bottom = rows[last];
        if (bottom.end > top.end) band.high = top.end - 1 - first;
        else if (first > 0) band.high = top.begin - first;
        if (bottom.begin > top.begin) band.low = bottom.begin - last;
        else if (last < count - 1) band.low = bottom.end - 1 - last;
    }
    bool shows(const Band &band, int64_t start, int64_t stop) const {
        for (int64_t i = 0; i < count; ++i)
            if (!band.gives(rows[i], i, start, stop)) return false;
        return true;
    }

  private:
    bool empty(int64_t i) const { return rows[i].begin == rows[i].end; }
};

bool fit(const Mask &mask, const std::vector<Interval> &intervals, heedful_band &result) {
    std::vector<Plane> planes;
    Band band;
    for (int64_t p = 0; p < mask.planes(); ++p) {
        planes.emplace_back(intervals.data() + p * mask.rows, mask.rows);
        // A row that stands for all of them knows no diagonal.
        if (mask.rows > 1) planes.back().limit(band);
    }
    const auto all_show = [&](auto range) {
        for (int64_t p = 0; p < mask.planes(); ++p) {
            const auto [start, stop] = range(p / mask.heads);
            if (!planes[size_t(p)].shows(band, start, stop)) return false;
        }
        return true;
    };
    result.low = band.low;
    result.high = band.high;
    result.kind = 1;
    if (all_show([&](int64_t) { return std::pair<int64_t, int64_t>(0, mask.keys); })) return true;
    for (int64_t item = 0; item < mask.items; ++item) {
        const Plane &plane = planes[size_t(item * mask.heads)];
        int32_t stop = 0;
        if (!plane.nothing())
            for (int64_t i = 0; i < mask.rows; ++i) stop = std::max(stop, plane.rows[i].end);
        result.start[item] = plane.nothing() ? 0 : plane.rows[plane.first].begin;
        result.stop[item] = stop;
    }
    result.kind = 2;
    return all_show([&](int64_t item) { return std::pair<int64_t, int64_t>(result.start[item], result.stop[item]); });
}

template <class Kind>
bool read_intervals(const Mask &mask, std::vector<Interval> &found, const heedful_threads *threads) {
    // Most masks that are no band say so in one of these rows, and are not read on.
    for (int64_t i : {int64_t(0), mask.rows / 2, mask.rows - 1})
        if (!read_row<Kind>(mask.row<Kind>(0, i), mask.keys, found[size_t(i)])) return false;
    const int64_t run = std::max<int64_t>(1, ITEM_BYTES / int64_t(mask.keys * sizeof(typename Kind::Element)));
    const int64_t runs = (mask.rows + run - 1) / run;
    std::atomic<bool> fits{true};
    share_out(threads, mask.planes() * runs, [&](auto claim) {
        for (int64_t index = claim(); index >= 0 && fits.load(std::memory_order_relaxed); index = claim()) {
            const int64_t plane = index / runs, first = index % runs * run;
            for (int64_t i = first; i < std::min(mask.rows, first + run); ++i)
                if (!read_row<Kind>(mask.row<Kind>(plane, i), mask.keys, found[size_t(plane * mask.rows + i)])) {
                    fits = false;
                    return;
                }
        }
    });
    return fits;
}

void find_band(const heedful_tensor &tensor, int64_t q_length, int64_t k_length, heedful_band &result,
               const heedful_threads *threads) {
    const Mask mask(tensor, q_length, k_length);
    REQUIRE(result.start && result.stop, "band: start and stop take memory for an int32 per item of the mask");
    std::vector<Interval> intervals(size_t(mask.planes() * mask.rows));
    bool found = false;
    with_kind(tensor.dtype, [&](auto kind) {
        found = read_intervals<decltype(kind)>(mask, intervals, threads) && fit(mask, intervals, result);
    });
    if (!found) {
        result.kind = 0;
        return;
    }
    result.low = std::max(result.low, -q_length);
    result.high = std::min(result.high, k_length);
    // Items that the mask repeats.
    for (int64_t item = mask.items; item < tensor.size[0]; ++item) {
        result.start[item] = result.start[0];
        result.stop[item] = result.stop[0];
    }
}

struct Pieces {
    uint8_t *full, *partial, *pairs;
    int64_t tile;
    std::atomic<int64_t> full_count{0}, partial_count{0};
    std::atomic<bool> bias{false};
};

// One row's part of one tile: whether all and any of its pairs count, and what else its elements say.
template <class Kind>
void read_piece(const typename Kind::Element *row, int64_t count, uint8_t *pairs, uint8_t &all, uint8_t &any,
                uint8_t &neither, uint8_t &finite) {
    for (int64_t k = 0; k < count; ++k) {
        const uint8_t counts = Kind::counts(row[k]), excluded = Kind::excluded(row[k]);
        all &= counts;
        any |= counts;
        neither |= uint8_t(!(counts | excluded));
        finite |= uint8_t(excluded & !Kind::infinite(row[k]));
        if (pairs) pairs[k] = counts;
    }
}

template <class Kind> bool read_tiles(const Mask &mask, Pieces &out, int64_t plane, int64_t tile_row) {
    const int64_t columns = (mask.keys + out.tile - 1) / out.tile, tile_rows = (mask.rows + out.tile - 1) / out.tile;
    uint8_t *const full = out.full + (plane * tile_rows + tile_row) * columns;
    uint8_t *const partial = out.partial + (plane * tile_rows + tile_row) * columns; // any, until the end
    std::memset(full, 1, size_t(columns));
    std::memset(partial, 0, size_t(columns));
    for (int64_t i = tile_row * out.tile; i < std::min(mask.rows, (tile_row + 1) * out.tile); ++i) {
        const auto *const row = mask.row<Kind>(plane, i);
        uint8_t *const pairs = out.pairs ? out.pairs + (plane * mask.rows + i) * mask.keys : nullptr;
        uint8_t row_any = 0, neither = 0, finite = 0;
        for (int64_t c = 0; c < columns; ++c) {
            const int64_t first = c * out.tile, count = std::min(out.tile, mask.keys - first);
            uint8_t all = full[c], any = 0;
            if (pairs) read_piece<Kind>(row + first, count, pairs + first, all, any, neither, finite);
            else read_piece<Kind>(row + first, count, nullptr, all, any, neither, finite);
            full[c] = all;
            partial[c] |= any;
            row_any |= any;
        }
        if (neither || (finite && !row_any)) return false;
    }
    int64_t full_count = 0, partial_count = 0;
    for (int64_t c = 0; c < columns; ++c) {
        partial[c] &= uint8_t(!full[c]);
        full_count += full[c];
        partial_count += partial[c];
    }
    out.full_count += full_count;
    out.partial_count += partial_count;
    return true;
}

void sort_tiles(const heedful_tensor &tensor, int64_t q_length, int64_t k_length, heedful_mask_tiling &tiling,
                const heedful_threads *threads) {
    const Mask mask(tensor, q_length, k_length);
    REQUIRE(tiling.tile >= 1, "tile: is " + std::to_string(tiling.tile) + ", takes 1 or more");
    REQUIRE(tiling.full && tiling.partial, "tiling: full and partial take memory");
    const int64_t tile_rows = (mask.rows + tiling.tile - 1) / tiling.tile,
                  columns = (mask.keys + tiling.tile - 1) / tiling.tile;
    tiling.kind = 0;
    with_kind(tensor.dtype, [&](auto kind) {
        Pieces sample = {tiling.full, tiling.partial, tiling.pairs, tiling.tile};
        const int64_t samples[] = {0, tile_rows / 2, tile_rows - 1};
        for (int64_t tile_row : samples)
            if (!read_tiles<decltype(kind)>(mask, sample, 0, tile_row)) return;
        if (2 * sample.partial_count > int64_t(std::size(samples)) * columns) return;
        Pieces pieces = {tiling.full, tiling.partial, tiling.pairs, tiling.tile};
        share_out(threads, mask.planes() * tile_rows, [&](auto claim) {
            for (int64_t index = claim(); index >= 0 && !pieces.bias.load(std::memory_order_relaxed); index = claim())
                if (!read_tiles<decltype(kind)>(mask, pieces, index / tile_rows, index % tile_rows)) pieces.bias = true;
        });
        tiling.kind = pieces.bias ? 0 : 1;
        tiling.full_count = pieces.full_count;
        tiling.partial_count = pieces.partial_count;
    });
}

} // namespace
} // namespace heedful

using namespace heedful;

extern "C" heedful_status heedful_mask_band(const heedful_tensor *mask, int64_t q_length, int64_t k_length,
                                            heedful_band *band, const heedful_threads *threads) {
    return guarded([&] { find_band(*mask, q_length, k_length, *band, threads); });
}

extern "C" heedful_status heedful_mask_tiles(const heedful_tensor *mask, int64_t q_length, int64_t k_length,
                                             heedful_mask_tiling *tiling, const heedful_threads *threads) {
    return guarded([&] { sort_tiles(*mask, q_length, k_length, *tiling, threads); });
}
