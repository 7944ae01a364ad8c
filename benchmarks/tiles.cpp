// The tile kernels of one tier alone, one thread, on operands in the cache: their share of the multiply-add rate that
// the same tier reaches register to register, measured turn by turn. `make bench-tiles` builds this once per tier and
// runs all that the processor has.

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(HEEDFUL_TIER_NEON)
#include <arm_neon.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "heedful.h"
#include "kernels/tier.h"

namespace heedful {
namespace {
#include "kernels/table.h"

constexpr double WANTED = 0.95;
constexpr int ROUNDS = 60;

#if defined(__AVX512BF16__)
typedef Paired BFloat16;
#else
typedef Single<float, bfloat16> BFloat16;
#endif

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class Body> double seconds(Body body) {
    const double start = now();
    body();
    return now() - start;
}

template <class T> T *zeros(size_t count) {
    const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
    void *const memory = std::aligned_alloc(4096, bytes);
    std::memset(memory, 0, bytes);
    return static_cast<T *>(memory);
}

// The best rates of a kernel and of the peak beside it; the best, because what slows a round is somebody else's.
template <class A, class Body>
void measure(const char *type, const char *kernel, int64_t dim, double flops, Body body) {
    constexpr int64_t BURN = 20000;
    const int repeats = int(std::max(1.0, 4e6 / flops));
    double best = 0, peak = 0;
    for (int round = 0; round < ROUNDS; ++round) {
        double done = 0;
        const double burning = seconds([&] { done = burn<A>(BURN); });
        peak = std::max(peak, done / burning);
        best = std::max(best, repeats * flops / seconds([&] {
                                  for (int repeat = 0; repeat < repeats; ++repeat) body();
                              }));
    }
    std::printf("%-12s %-5s %4d  %-11s %8.1f %8.1f %7.1f %%  %s\n", HEEDFUL_TIER, type, int(dim), kernel, best / 1e9,
                peak / 1e9, 100 * best / peak, best >= WANTED * peak ? "ok" : "below 95 %");
}

template <class A> void measure_type(const char *type, int64_t dim) {
    typedef Tiles<A> Tile;
    typedef typename A::Number T;
    typedef typename A::Word Word;
    constexpr int ROWS = MAX_TILE_ROWS, QUERIES = 8 * ROWS, UNIT = Tile::UNIT, UNITS = Tile::UNITS;
    const int64_t steps = dim / A::PER_WORD;
    Word *const query = zeros<Word>(ROWS * steps), *const key = zeros<Word>(KEY_BLOCK * steps),
                *const value = zeros<Word>(KEY_BLOCK / A::PER_WORD * dim),
                *const weights = zeros<Word>(QUERIES / A::PER_WORD * Tile::SCORE_STRIDE);
    T *const score = zeros<T>(ROWS * Tile::SCORE_STRIDE), *const out = zeros<T>(ROWS * dim);
    auto *const weight = zeros<typename A::Weight>(ROWS * Tile::WEIGHT_STRIDE);
    const Word *values[UNITS];
    for (int u = 0; u < UNITS; ++u) values[u] = value + u * (UNIT / A::PER_WORD) * dim;
    T decay[ROWS];
    std::fill_n(decay, ROWS, T(1));

    const double flops = 2.0 * ROWS * KEY_BLOCK * dim;
    measure<A>(type, "score_tile", dim, flops, [&] {
        for (int first = 0; first < ROWS; first += PANEL)
            for (int u = 0; u < UNITS; ++u)
                Tile::template score_tile<PANEL>(query + first * steps, key + u * steps * UNIT, steps,
                                                 score + first * Tile::SCORE_STRIDE + u * UNIT);
    });
    measure<A>(type, "value_tile", dim, flops, [&] {
        for (int first = 0; first < ROWS; first += PANEL)
            for (int64_t column = 0; column < dim; column += UNIT)
                Tile::template value_tile<PANEL, 2>(weight + first * Tile::WEIGHT_STRIDE, values, column, dim, UNITS,
                                                    out + first * dim + column, dim, decay);
    });
    measure<A>(type, "outer_tile", dim, 2.0 * ROWS * QUERIES * dim, [&] {
        for (int first = 0; first < ROWS; first += PANEL)
            for (int64_t column = 0; column < dim; column += UNIT)
                Tile::template outer_tile<PANEL, 2>(weights + first, Tile::SCORE_STRIDE, value + column, dim,
                                                    QUERIES / A::PER_WORD, out + first * dim + column, dim);
    });
    for (void *memory : {static_cast<void *>(query), static_cast<void *>(key), static_cast<void *>(value),
                         static_cast<void *>(weights), static_cast<void *>(score), static_cast<void *>(out),
                         static_cast<void *>(weight)})
        std::free(memory);
}

bool runnable() {
    for (int32_t tier = 0; tier < heedful_isa_count(); ++tier)
        if (!std::strcmp(heedful_isa_name(tier), HEEDFUL_TIER)) return heedful_isa_runnable(tier);
    return false;
}

} // namespace
} // namespace heedful

int main() {
    using namespace heedful;
    if (!runnable()) return std::printf("%-12s this processor does not have it\n", HEEDFUL_TIER), 0;
    std::printf("tier         type     D  kernel       GFLOP/s     peak     share\n");
    for (int64_t dim = 64; dim <= 128; dim *= 2) {
        measure_type<Single<float, float>>("fp32", dim);
        measure_type<BFloat16>("bf16", dim);
        measure_type<Single<double, double>>("fp64", dim);
    }
}
