// The tile kernels and the softmax alone, one thread, AVX-512 BF16: share of the multiply-add rate, and cycles per
// vector of 16 scores (a multiply-add is 1 a cycle).
//
//     tier="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mavx512bf16 -mavx512vnni"
//     g++ -std=c++17 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -w $tier -Iengine -Iengine/include \
//         benchmarks/tiles.cpp engine/schedule.cpp -o build/tiles && taskset -c 1 build/tiles

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/tier.h"

namespace heedful {

void set_error_message(const char *) {}

namespace {
#include "kernels/simd.h"

#include "kernels/arithmetic.h"

#include "kernels/tiles.h"

#include "kernels/pack.h"

#include "kernels/forward.h"

#include "kernels/burn.h"

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class Body> double best_seconds(Body body) {
    double best = 1e9;
    for (int run = 0; run < 30; ++run) {
        const double start = now();
        for (int round = 0; round < 20; ++round) body();
        best = std::min(best, (now() - start) / 20);
    }
    return best;
}

template <class T> T *zeros(size_t count) {
    void *const memory = std::aligned_alloc(4096, (count * sizeof(T) + 4095) / 4096 * 4096);
    std::memset(memory, 0, count * sizeof(T));
    return static_cast<T *>(memory);
}

template <class A> void measure(const char *name, int64_t dim) {
    typedef Tiles<A> Tile;
    typedef typename A::Number T;
    typedef typename A::Word Word;
    constexpr int ROWS = MAX_TILE_ROWS, UNIT = Tile::UNIT, UNITS = Tile::UNITS, LANES = Tile::LANES;
    const int64_t steps = dim / A::PER_WORD;
    Word *const query = zeros<Word>(ROWS * steps), *const key = zeros<Word>(KEY_BLOCK * steps),
                *const value = zeros<Word>(KEY_BLOCK / A::PER_WORD * dim);
    T *const score = zeros<T>(ROWS * Tile::SCORE_STRIDE), *const out = zeros<T>(ROWS * dim);
    auto *const weight = zeros<typename A::Weight>(ROWS * Tile::WEIGHT_STRIDE);
    Expansion seen = {};
    seen.unit_count = UNITS;
    const Word *values[UNITS];
    for (int u = 0; u < UNITS; ++u) {
        seen.index[u] = uint8_t(u);
        values[u] = value + u * (UNIT / A::PER_WORD) * dim;
    }
    T decay[ROWS];
    std::fill_n(decay, ROWS, T(1));

    const double rate = 1 / best_seconds([] { burn<A>(20000); }) * burn<A>(20000);
    const double flops = 2.0 * ROWS * KEY_BLOCK * dim, cycle = 2.0 * LANES * A::PER_WORD / rate;
    const double vectors = double(ROWS) * KEY_BLOCK / LANES;
    const double scores = best_seconds([&] {
        for (int first = 0; first < ROWS; first += PANEL)
            for (int u = 0; u < UNITS; ++u)
                Tile::template score_tile<PANEL>(query + first * steps, key + u * steps * UNIT, steps,
                                                 score + first * Tile::SCORE_STRIDE + u * UNIT);
    });
    const double outputs = best_seconds([&] {
        for (int first = 0; first < ROWS; first += PANEL)
            for (int64_t column = 0; column < dim; column += UNIT)
                Tile::template value_tile<PANEL, 2>(weight + first * Tile::WEIGHT_STRIDE, values, column, dim, UNITS,
                                                    out + first * dim + column, dim, decay);
    });
    volatile T sink = 0;
    const double weights = best_seconds([&] {
        for (int r = 0; r < ROWS; ++r)
            sink = Forward<A>::row_weights(seen, score + r * Tile::SCORE_STRIDE, weight + r * Tile::WEIGHT_STRIDE,
                                           T(0.1), T(0.5))[0];
    });
    std::printf("%-5s D %-4d score tile %.1f %%, value tile %.1f %%, weights %.1f cycles\n", name, int(dim),
                100 * flops / scores / rate, 100 * flops / outputs / rate, weights / vectors / cycle);
}

} // namespace
} // namespace heedful

int main() {
    for (int64_t dim = 64; dim <= 128; dim *= 2) {
        heedful::measure<heedful::Single<float, float>>("fp32", dim);
        heedful::measure<heedful::Paired>("bf16", dim);
    }
}
