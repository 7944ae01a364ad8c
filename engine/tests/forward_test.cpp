// The C interface against a plain loop in double, on random shapes, strides, types and schedules, with and
// without threads. Needs neither Python nor torch, so that sanitizers and emulators can run it.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "heedful.h"

namespace {

constexpr int64_t END = -2, NONE = -1;
std::mt19937 generator(1);

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

double decode(int32_t dtype, const char *p) {
    if (dtype == HEEDFUL_FLOAT64) {
        double x;
        std::memcpy(&x, p, 8);
        return x;
    }
    float x;
    if (dtype == HEEDFUL_FLOAT32) {
        std::memcpy(&x, p, 4);
        return x;
    }
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    if (dtype == HEEDFUL_BFLOAT16) {
        const uint32_t wide = uint32_t(bits) << 16;
        std::memcpy(&x, &wide, 4);
        return x;
    }
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(fraction, -24)
                                             : std::ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
}

// Values that every type holds exactly: eighths up to 2.
void encode(int32_t dtype, char *p, int eighths) {
    const double x = eighths / 8.0;
    const float narrow = float(x);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    uint16_t half = uint16_t(bits >> 16);
    if (dtype == HEEDFUL_FLOAT64) std::memcpy(p, &x, 8);
    if (dtype == HEEDFUL_FLOAT32) std::memcpy(p, &narrow, 4);
    if (dtype == HEEDFUL_FLOAT16)
        half = eighths ? uint16_t((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13) : uint16_t(0);
    if (dtype == HEEDFUL_BFLOAT16 || dtype == HEEDFUL_FLOAT16) std::memcpy(p, &half, 2);
}

constexpr int64_t BYTES[] = {4, 2, 2, 8};
constexpr double ROUNDOFF[] = {0x1p-24, 0x1p-9, 0x1p-11, 0x1p-53}, WEIGHT_ROUNDOFF[] = {0, 0x1p-9, 0, 0};

// A tensor with gaps between its rows and, now and then, between its columns.
struct Tensor {
    std::vector<char> memory;
    heedful_tensor view = {};

    Tensor(int32_t dtype, std::vector<int64_t> size, bool gaps) {
        view.dtype = dtype;
        view.ndim = int32_t(size.size());
        int64_t stride = gaps && pick(0, 4) == 0 ? 2 : 1;
        for (int axis = view.ndim - 1; axis >= 0; --axis) {
            view.size[axis] = size[axis];
            view.stride[axis] = stride;
            stride = stride * size[axis] + (gaps ? pick(0, 3) : 0);
        }
        memory.resize(size_t((stride + 1) * BYTES[dtype]), char(0xff)); // NaN in every type
        view.data = memory.data();
    }
    char *at(int64_t b, int64_t h, int64_t i, int64_t d) {
        const int64_t *s = view.stride;
        return memory.data() + (b * s[0] + h * s[1] + i * s[2] + d * s[3]) * BYTES[view.dtype];
    }
    void fill() {
        for (int64_t b = 0; b < view.size[0]; ++b)
            for (int64_t h = 0; h < view.size[1]; ++h)
                for (int64_t i = 0; i < view.size[2]; ++i)
                    for (int64_t d = 0; d < view.size[3]; ++d) encode(view.dtype, at(b, h, i, d), int(pick(-16, 16)));
    }
};

std::vector<int64_t> random_schedule() {
    const int64_t radius = pick(0, 40), size = pick(1, 70);
    switch (pick(0, 5)) {
    case 0:
        return {};
    case 1:
        return {1, 1, 0, 2, 1, 0, END, 1, NONE};
    case 2:
        return {1, 2, 0, 2, 0, -radius, END, 1, NONE, 0, 2, 1, radius, END, 1, NONE};
    case 3:
        return {1, 1, 2, size, 0, END, 1, NONE};
    case 4:
        return {2, 1, 0, 1, 1, radius, NONE, 1, NONE, 1, 1, 1 + size % 7, 0, END, 1, NONE};
    default:
        return {1, 1, 5, 0};
    }
}

void run_on_threads(void *, int64_t count, void (*body)(void *, int64_t), void *argument) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) threads.emplace_back(body, argument, i);
    for (std::thread &thread : threads) thread.join();
}

bool check(int round) {
    const int32_t dtype = int32_t(round % 4);
    const int64_t batch = pick(1, 2), kv_heads = pick(1, 2), heads = kv_heads * pick(1, 3), q_length = pick(0, 60),
                  k_length = pick(0, 4) ? pick(0, 90) : pick(250, 530), dim = pick(1, 40), value_dim = pick(1, 40);
    Tensor query(dtype, {batch, heads, q_length, dim}, true), key(dtype, {batch, kv_heads, k_length, dim}, true),
        value(dtype, {batch, kv_heads, k_length, value_dim}, true),
        out(dtype, {batch, heads, q_length, value_dim}, true);
    Tensor lse(dtype == HEEDFUL_FLOAT64 ? HEEDFUL_FLOAT64 : HEEDFUL_FLOAT32, {batch, heads, q_length}, false);
    query.fill();
    key.fill();
    value.fill();
    std::vector<uint8_t> mask_bytes(size_t(batch * heads * q_length * k_length + 1));
    for (uint8_t &byte : mask_bytes) byte = pick(0, 2) == 0;
    heedful_tensor mask = {mask_bytes.data(), HEEDFUL_BOOL, 4, {batch, heads, q_length, k_length}, {}};
    for (int64_t axis = 3, stride = 1; axis >= 0; stride *= mask.size[axis--]) mask.stride[axis] = stride;

    const std::vector<int64_t> code = random_schedule();
    heedful_forward call = {query.view, key.view, value.view, out.view, lse.view, 0.3, {}};
    call.schedule = {code.data(), int64_t(code.size()), &mask, 1};
    const heedful_threads threads = {3, run_on_threads, nullptr};
    if (heedful_attention_forward(&call, round % 2 ? &threads : nullptr) != HEEDFUL_OK) {
        std::printf("round %d: %s\n", round, heedful_error_message());
        return false;
    }
    std::vector<uint8_t> pairs(size_t(q_length * k_length + 1));
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h) {
            heedful_schedule_mask(&call.schedule, batch, b, h, q_length, k_length, pairs.data());
            for (int64_t i = 0; i < q_length; ++i) {
                std::vector<double> weight(size_t(k_length), 0.0);
                double total = 0, largest = 0;
                for (int64_t j = 0; j < k_length; ++j) {
                    if (!pairs[size_t(i * k_length + j)]) continue;
                    double score = 0;
                    for (int64_t d = 0; d < dim; ++d)
                        score += decode(dtype, query.at(b, h, i, d)) *
                                 decode(dtype, key.at(b, h / (heads / kv_heads), j, d));
                    largest = std::max(largest, std::fabs(0.3 * score));
                    total += weight[size_t(j)] = std::exp(0.3 * score);
                }
                const double roundoff = dtype == HEEDFUL_FLOAT64 ? 0x1p-53 : 0x1p-24;
                for (int64_t d = 0; d < value_dim; ++d) {
                    double wanted = 0, spread = 0;
                    for (int64_t j = 0; j < k_length; ++j) {
                        if (weight[size_t(j)] == 0) continue;
                        const double term =
                            weight[size_t(j)] / total * decode(dtype, value.at(b, h / (heads / kv_heads), j, d));
                        wanted += term;
                        spread += std::fabs(term);
                    }
                    const double found = decode(dtype, out.at(b, h, i, d));
                    const double bound = 8 * (ROUNDOFF[dtype] * std::fabs(wanted) +
                                              (WEIGHT_ROUNDOFF[dtype] + roundoff * (8 + 4 * largest)) * spread) +
                                         0x1p-24 * (dtype == HEEDFUL_FLOAT16);
                    if (!(std::fabs(found - wanted) <= bound)) {
                        std::printf("round %d: out[%d,%d,%d,%d] is %.9g, not %.9g\n", round, int(b), int(h), int(i),
                                    int(d), found, wanted);
                        return false;
                    }
                }
                const double sum = decode(lse.view.dtype,
                                          lse.memory.data() + ((b * heads + h) * q_length + i) * BYTES[lse.view.dtype]);
                const double wanted = total > 0 ? std::log(total) : -std::numeric_limits<double>::infinity();
                if (!(sum == wanted || std::fabs(sum - wanted) <= 8 * 0x1p-24 * (8 + 4 * largest))) {
                    std::printf("round %d: lse is %.9g, not %.9g\n", round, sum, wanted);
                    return false;
                }
            }
        }
    return true;
}

} // namespace

int main(int argc, char **argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
    for (int round = 0; round < rounds; ++round)
        if (!check(round)) return 1;
    std::printf("%d calls on %s agree\n", rounds, heedful_isa_name(heedful_isa_selected()));
    return 0;
}
