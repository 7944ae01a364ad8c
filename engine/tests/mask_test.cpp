// Bands and tiles of dense masks against the pairs that they were made of.

#include <cmath>

#include "checks.h"

namespace {

constexpr double INF = INFINITY;

struct Case {
    int64_t items, heads, q_length, k_length;
    std::vector<uint8_t> pairs = {}; // (items, heads, q_length, k_length)
    bool is_band = false;            // made as one; a random mask may be one too
    int64_t low = 0, high = 0;
    std::vector<int64_t> start = {}, stop = {};

    bool counts(int64_t b, int64_t h, int64_t i, int64_t j) const {
        return pairs[size_t(((b * heads + h) * q_length + i) * k_length + j)];
    }
};

Case band_case(Source &source) {
    Case c = {source.pick(1, 3), source.pick(1, 2), source.pick(1, 150), source.pick(1, 200)};
    c.is_band = true;
    const bool below = source.pick(0, 2), above = source.pick(0, 2), padded = source.pick(0, 1);
    c.low = below ? source.pick(-c.q_length, c.k_length) : -c.q_length;
    c.high = above ? std::max(c.low, source.pick(-c.q_length, c.k_length)) : c.k_length;
    for (int64_t b = 0; b < c.items; ++b) {
        c.start.push_back(padded ? source.pick(0, c.k_length) : 0);
        c.stop.push_back(padded ? source.pick(0, c.k_length) : c.k_length);
    }
    for (int64_t b = 0; b < c.items; ++b)
        for (int64_t h = 0; h < c.heads; ++h)
            for (int64_t i = 0; i < c.q_length; ++i)
                for (int64_t j = 0; j < c.k_length; ++j)
                    c.pairs.push_back(j - i >= c.low && j - i <= c.high && j >= c.start[size_t(b)] &&
                                      j < c.stop[size_t(b)]);
    return c;
}

// Blocks of pairs, some full, some empty, some neither; or one pair changed in a band.
Case other_case(Source &source) {
    if (source.pick(0, 1)) {
        Case c = band_case(source);
        const size_t place = size_t(source.pick(0, int64_t(c.pairs.size()) - 1));
        c.pairs[place] = !c.pairs[place];
        c.is_band = false;
        return c;
    }
    Case c = {source.pick(1, 2), source.pick(1, 2), source.pick(1, 150), source.pick(1, 200)};
    const int64_t size = source.pick(1, 70);
    const uint64_t salt = uint64_t(source.pick(0, 1 << 20));
    for (int64_t b = 0; b < c.items * c.heads; ++b)
        for (int64_t i = 0; i < c.q_length; ++i)
            for (int64_t j = 0; j < c.k_length; ++j)
                c.pairs.push_back(((uint64_t(b * 31 + i / size * 7 + j / size) * 2654435761u + salt) >> 7) % 3 == 0);
    return c;
}

double value(Source &source, int32_t dtype, bool counts, bool alone) {
    if (dtype == HEEDFUL_BOOL) return counts;
    if (counts) return source.pick(0, 1) ? 0.0 : -0.0;
    // A row of nothing else takes -inf; fp16 has no other.
    return alone || dtype == HEEDFUL_FLOAT16 || source.pick(0, 1) ? -INF : -3e38;
}

Tensor tensor_of(Source &source, const Case &c, int32_t dtype) {
    Tensor tensor(dtype, {c.items, c.heads, c.q_length, c.k_length});
    for (int64_t b = 0; b < c.items; ++b)
        for (int64_t h = 0; h < c.heads; ++h)
            for (int64_t i = 0; i < c.q_length; ++i) {
                bool alone = true;
                for (int64_t j = 0; j < c.k_length; ++j) alone &= !c.counts(b, h, i, j);
                for (int64_t j = 0; j < c.k_length; ++j)
                    tensor.set(value(source, dtype, c.counts(b, h, i, j), alone), b, h, i, j);
            }
    return tensor;
}

bool check_band(const Case &c, const Tensor &mask, int64_t threads, const std::string &what) {
    std::vector<int32_t> start(size_t(c.items), -7), stop(size_t(c.items), -7);
    heedful_band band = {0, 0, start.data(), stop.data(), -1};
    heedful_threads storage;
    const heedful_tensor view = mask.seen();
    EXPECT(heedful_mask_band(&view, c.q_length, c.k_length, &band, threads_of(threads, storage)) == HEEDFUL_OK,
           what + ": " + heedful_error_message());
    EXPECT(band.kind >= 0 && band.kind <= 2, what + ": kind " + std::to_string(band.kind));
    EXPECT(!c.is_band || band.kind > 0, what + ": the band is not seen");
    if (band.kind == 0) return true;
    for (int64_t b = 0; b < c.items; ++b)
        for (int64_t h = 0; h < c.heads; ++h)
            for (int64_t i = 0; i < c.q_length; ++i)
                for (int64_t j = 0; j < c.k_length; ++j) {
                    bool counts = j - i >= band.low && j - i <= band.high;
                    if (band.kind == 2) counts &= j >= start[size_t(b)] && j < stop[size_t(b)];
                    EXPECT(counts == c.counts(b, h, i, j), what + ": pair" + at({b, h, i, j}));
                }
    return true;
}

bool check_tiles(const Case &c, const Tensor &mask, int64_t tile, int64_t threads, const std::string &what) {
    const int64_t rows = (c.q_length + tile - 1) / tile, columns = (c.k_length + tile - 1) / tile;
    const size_t count = size_t(c.items * c.heads * rows * columns);
    std::vector<uint8_t> full(count, 9), partial(count, 9), pairs(c.pairs.size(), 9);
    heedful_mask_tiling tiling = {tile, full.data(), partial.data(), pairs.data(), -1, -1, -1};
    heedful_threads storage;
    const heedful_tensor view = mask.seen();
    EXPECT(heedful_mask_tiles(&view, c.q_length, c.k_length, &tiling, threads_of(threads, storage)) == HEEDFUL_OK,
           what + ": " + heedful_error_message());
    if (tiling.kind == 0) return true;
    EXPECT(pairs == c.pairs, what + ": pairs");
    int64_t full_count = 0, partial_count = 0;
    for (int64_t plane = 0, place = 0; plane < c.items * c.heads; ++plane)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t column = 0; column < columns; ++column, ++place) {
                bool all = true, any = false;
                for (int64_t i = r * tile; i < std::min(c.q_length, (r + 1) * tile); ++i)
                    for (int64_t j = column * tile; j < std::min(c.k_length, (column + 1) * tile); ++j) {
                        const bool counts = c.counts(plane / c.heads, plane % c.heads, i, j);
                        all &= counts;
                        any |= counts;
                    }
                EXPECT(full[size_t(place)] == all && partial[size_t(place)] == (any && !all),
                       what + ": tile" + at({plane, r, column}));
                full_count += all;
                partial_count += any && !all;
            }
    EXPECT(tiling.full_count == full_count && tiling.partial_count == partial_count, what + ": counts");
    return true;
}

// What is no mask of pairs: another number, or a row of finite numbers alone.
bool check_bias(Source &source, int32_t dtype) {
    Case c = band_case(source);
    Tensor mask = tensor_of(source, c, dtype);
    const int64_t i = source.pick(0, c.q_length - 1);
    const bool row = dtype != HEEDFUL_FLOAT16 && source.pick(0, 1);
    const double others[] = {-1.5, 1e-6, NAN, INF, -6e4};
    const double other = others[size_t(source.pick(0, 4))];
    const int64_t place = source.pick(0, c.k_length - 1);
    for (int64_t j = 0; j < c.k_length; ++j)
        if (row || j == place) mask.set(row ? -3e38 : other, 0, 0, i, j);
    heedful_tensor view = mask.seen();
    std::vector<int32_t> ends(size_t(2 * c.items));
    heedful_band band = {0, 0, ends.data(), ends.data() + c.items, -1};
    std::vector<uint8_t> full(c.pairs.size()), partial(c.pairs.size());
    heedful_mask_tiling tiling = {16, full.data(), partial.data(), nullptr, -1, -1, -1};
    EXPECT(heedful_mask_band(&view, c.q_length, c.k_length, &band, nullptr) == HEEDFUL_OK && band.kind == 0,
           "a bias passes for a band");
    EXPECT(heedful_mask_tiles(&view, c.q_length, c.k_length, &tiling, nullptr) == HEEDFUL_OK && tiling.kind == 0,
           "a bias passes for a mask of pairs");
    return true;
}

// One row, head and item that stand for all.
bool check_repeated(Source &source) {
    Case c = {3, 2, 40, source.pick(2, 100)};
    Tensor mask(HEEDFUL_BOOL, {3, 1, 1, c.k_length});
    std::vector<int32_t> start(3), stop(3);
    for (int64_t b = 0; b < 3; ++b)
        for (int64_t j = 0; j < c.k_length; ++j) mask.set(j >= b && j < c.k_length - 1, b, 0, 0, j);
    heedful_tensor view = mask.seen();
    heedful_band band = {0, 0, start.data(), stop.data(), -1};
    EXPECT(heedful_mask_band(&view, c.q_length, c.k_length, &band, nullptr) == HEEDFUL_OK && band.kind == 2 &&
               band.low == -c.q_length && band.high == c.k_length,
           "padding of keys is not seen");
    for (int32_t b = 0; b < 3; ++b)
        EXPECT(c.k_length - 1 <= b || (start[size_t(b)] == b && stop[size_t(b)] == c.k_length - 1),
               "padding of keys is misread");
    view.size[1] = 2;
    view.stride[1] = 0;
    view.stride[0] = 0;
    EXPECT(heedful_mask_band(&view, c.q_length, c.k_length, &band, nullptr) == HEEDFUL_OK && band.kind == 2 &&
               start[2] == 0 && stop[2] == c.k_length - 1,
           "a repeated item is misread");
    return true;
}

bool check_refusals() {
    Tensor mask(HEEDFUL_BOOL, {1, 1, 4, 8});
    int32_t end = 0;
    heedful_band band = {0, 0, &end, &end, -1};
    heedful_tensor view = mask.seen();
    const auto refused = [&](int64_t q_length, int64_t k_length) {
        return heedful_mask_band(&view, q_length, k_length, &band, nullptr) == HEEDFUL_INVALID_ARGUMENT;
    };
    EXPECT(refused(5, 8) && refused(4, 9) && refused(4, 0), "lengths that are not the mask's are taken");
    view.stride[3] = 2;
    EXPECT(refused(4, 8), "keys with gaps are taken");
    view = mask.seen();
    view.dtype = HEEDFUL_INT32;
    EXPECT(refused(4, 8), "an int32 mask is taken");
    return true;
}

} // namespace

int main(int argc, char **argv) {
    const int rounds = begin(argc, argv, 300);
    const int32_t dtypes[] = {HEEDFUL_BOOL, HEEDFUL_FLOAT32, HEEDFUL_BFLOAT16, HEEDFUL_FLOAT16, HEEDFUL_FLOAT64};
    if (!check_refusals()) return 1;
    for (int round = 0; round < rounds; ++round) {
        Source source(uint64_t(round) + 900001);
        const Case c = round % 2 ? band_case(source) : other_case(source);
        const int32_t dtype = dtypes[round % 5];
        const std::string what = "mask " + std::to_string(round) + " of dtype " + std::to_string(dtype);
        const Tensor mask = tensor_of(source, c, dtype);
        for (int64_t threads : {1, 3})
            if (!check_band(c, mask, threads, what) || !check_tiles(c, mask, source.pick(1, 70), threads, what))
                return 1;
        if (dtype != HEEDFUL_BOOL && !check_bias(source, dtype)) return 1;
        if (!check_repeated(source)) return 1;
    }
    return end();
}
