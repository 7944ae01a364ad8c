// Attention and its gradients as plain loops in double over the C interface's own structures, and how far a result in
// a narrower type may be from them. The tests and the fuzz target compare with this.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "heedful.h"

namespace reference {

constexpr int64_t NONE = -1, END = -2;
enum { BOUND, STEP, CHUNK, DOCUMENTS, BLOCKS, MASK };
constexpr int64_t TERM_LENGTH[] = {7, 6, 6, 2, 3, 2};
constexpr double INFINITE = std::numeric_limits<double>::infinity();

// By heedful_dtype.
constexpr int64_t BYTES[] = {4, 2, 2, 8, 4, 1, 8};
// SMALLEST is what a result may be off by near 0. Below the smallest normal number rounding is absolute, each term of a
// sum adds its own, and the processor's dot product of bfloat16 pairs reads and gives 0; so 2^6 times that number, and
// for float16, whose sums are float32, its smallest subnormal.
constexpr double ROUNDOFF[] = {0x1p-24, 0x1p-9, 0x1p-11, 0x1p-53},
                 SMALLEST[] = {0x1p-120, 0x1p-120, 0x1p-24, 0x1p-1016};
// Weights, and gradients of scores, may be rounded to a half type before they are multiplied; those below the
// smallest normal number of the sums may be flushed to 0.
constexpr double WEIGHT_ROUNDOFF[] = {0, 0x1p-9, 0x1p-12, 0}, SUM_ROUNDOFF[] = {0x1p-24, 0x1p-24, 0x1p-24, 0x1p-53};
constexpr double FLUSHED[] = {0x1p-126, 0x1p-126, 0x1p-126, 0x1p-1022};

inline double decode(int32_t dtype, const void *p) {
    uint16_t half = 0;
    uint32_t word = 0;
    float single = 0;
    double x = 0;
    switch (dtype) {
    case HEEDFUL_FLOAT64:
        std::memcpy(&x, p, 8);
        return x;
    case HEEDFUL_FLOAT32:
        std::memcpy(&single, p, 4);
        return single;
    case HEEDFUL_BFLOAT16:
        std::memcpy(&half, p, 2);
        word = uint32_t(half) << 16;
        std::memcpy(&single, &word, 4);
        return single;
    case HEEDFUL_FLOAT16: {
        std::memcpy(&half, p, 2);
        const int exponent = half >> 10 & 31, fraction = half & 1023;
        x = exponent == 31  ? (fraction ? NAN : INFINITE)
            : exponent == 0 ? std::ldexp(fraction, -24)
                            : std::ldexp(1024 + fraction, exponent - 25);
        return half >> 15 ? -x : x;
    }
    case HEEDFUL_INT32:
        std::memcpy(&word, p, 4);
        return int32_t(word);
    case HEEDFUL_INT64: {
        int64_t wide;
        std::memcpy(&wide, p, 8);
        return double(wide);
    }
    default:
        return *static_cast<const uint8_t *>(p);
    }
}

// Rounds to nearest; half's largest numbers and bfloat16's are out of the tests' reach.
inline void encode(int32_t dtype, void *p, double x) {
    const float single = float(x);
    const int32_t integer = dtype == HEEDFUL_INT32 ? int32_t(x) : 0;
    uint32_t word;
    uint16_t half;
    switch (dtype) {
    case HEEDFUL_FLOAT64:
        std::memcpy(p, &x, 8);
        return;
    case HEEDFUL_FLOAT32:
        std::memcpy(p, &single, 4);
        return;
    case HEEDFUL_BFLOAT16:
        std::memcpy(&word, &single, 4);
        half = uint16_t((word + (std::isfinite(x) ? 0x7fff + (word >> 16 & 1) : 0)) >> 16);
        std::memcpy(p, &half, 2);
        return;
    case HEEDFUL_FLOAT16: {
        int exponent = 0;
        const double magnitude = std::fabs(x);
        if (!std::isfinite(x)) {
            half = uint16_t(x != x ? 0x7e00 : 0x7c00);
        } else {
            std::frexp(magnitude, &exponent);
            exponent = magnitude == 0 ? -13 : std::max(exponent, -13);
            // A fraction that rounds up to the next power of two carries into the exponent by itself.
            half = uint16_t(((exponent + 13) << 10) + int(std::nearbyint(std::ldexp(magnitude, 11 - exponent))));
        }
        half |= std::signbit(x) ? 0x8000 : 0;
        std::memcpy(p, &half, 2);
        return;
    }
    case HEEDFUL_INT32:
        std::memcpy(p, &integer, 4);
        return;
    default:
        *static_cast<uint8_t *>(p) = uint8_t(x);
    }
}

// A view and the memory behind it, no byte more than the view reaches, so that AddressSanitizer sees every step past
// it. It begins as NaN in every type.
struct Tensor {
    std::vector<char> memory;
    heedful_tensor view = {};

    Tensor() = default;
    Tensor(int32_t dtype, const std::vector<int64_t> &size, const std::vector<int64_t> &stride) {
        view.dtype = dtype;
        view.ndim = int32_t(size.size());
        int64_t last = 0, count = 1;
        for (size_t axis = 0; axis < size.size(); ++axis) {
            view.size[axis] = size[axis];
            view.stride[axis] = stride[axis];
            last += (size[axis] - 1) * stride[axis];
            count *= size[axis];
        }
        memory.assign(size_t(count ? (last + 1) * BYTES[dtype] : 0), char(0xff));
    }
    Tensor(int32_t dtype, const std::vector<int64_t> &size) : Tensor(dtype, size, contiguous(size)) {}

    static std::vector<int64_t> contiguous(const std::vector<int64_t> &size) {
        std::vector<int64_t> stride(size.size(), 1);
        for (size_t axis = size.size(); axis-- > 1;) stride[axis - 1] = stride[axis] * size[axis];
        return stride;
    }

    bool given() const { return view.ndim > 0; }
    heedful_tensor seen() const {
        heedful_tensor result = view;
        static char nothing; // a tensor without elements is still there
        result.data = !given()         ? nullptr
                      : memory.empty() ? static_cast<void *>(&nothing)
                                       : const_cast<char *>(memory.data());
        return result;
    }
    // A size of 1 answers for every index, as it does in the interface.
    int64_t offset(int64_t a, int64_t b, int64_t c, int64_t d) const {
        const int64_t index[] = {a, b, c, d};
        int64_t at = 0;
        for (int axis = 0; axis < view.ndim; ++axis) at += view.size[axis] == 1 ? 0 : index[axis] * view.stride[axis];
        return at * BYTES[view.dtype];
    }
    double get(int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) const {
        return decode(view.dtype, memory.data() + offset(a, b, c, d));
    }
    void set(double x, int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
        encode(view.dtype, memory.data() + offset(a, b, c, d), x);
    }
    template <class Body> void each(Body body) const {
        const int64_t n[] = {view.size[0], view.ndim > 1 ? view.size[1] : 1, view.ndim > 2 ? view.size[2] : 1,
                             view.ndim > 3 ? view.size[3] : 1};
        for (int64_t a = 0; a < n[0]; ++a)
            for (int64_t b = 0; b < n[1]; ++b)
                for (int64_t c = 0; c < n[2]; ++c)
                    for (int64_t d = 0; d < n[3]; ++d) body(a, b, c, d);
    }
};

struct Problem {
    int32_t dtype = HEEDFUL_FLOAT32;
    int64_t batch = 1, heads = 1, kv_heads = 1, q_length = 1, k_length = 1, dim = 1, value_dim = 1, page = 0;
    double scale = 1, softcap = 0, dropout_p = 0;
    uint64_t seed = 0;
    Tensor query, key, value, bias, slopes, query_offset, sinks, pages;
    std::vector<int64_t> code;
    std::vector<Tensor> operands;
    std::vector<heedful_tensor> operand_views; // filled by seal()

    int32_t sum_dtype() const { return dtype == HEEDFUL_FLOAT64 ? HEEDFUL_FLOAT64 : HEEDFUL_FLOAT32; }
    void seal() {
        operand_views.clear();
        for (const Tensor &operand : operands) operand_views.push_back(operand.seen());
    }
    heedful_schedule schedule() const {
        return {code.data(), int64_t(code.size()), operand_views.data(), int64_t(operand_views.size())};
    }
    heedful_features features() const {
        return {bias.seen(), slopes.seen(), query_offset.seen(), sinks.seen(), softcap, dropout_p, seed};
    }
    double key_at(int64_t b, int64_t h, int64_t j, int64_t d) const { return keyed(key, b, h, j, d); }
    double value_at(int64_t b, int64_t h, int64_t j, int64_t d) const { return keyed(value, b, h, j, d); }

  private:
    double keyed(const Tensor &tensor, int64_t b, int64_t h, int64_t j, int64_t d) const {
        const int64_t head = h / (heads / kv_heads);
        if (!page) return tensor.get(b, head, j, d);
        return tensor.get(int64_t(pages.get(b, j / page)), head, j % page, d);
    }
};

inline int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Whether a pair counts, read from the code as src/heedful/patterns/schedule.py documents it.
class Pairs {
  public:
    Pairs(const Problem &problem, int64_t b, int64_t h) : p(problem), b(b), h(h) {}

    bool counts(int64_t i, int64_t j) const {
        if (p.code.empty()) return true;
        size_t at = 1;
        bool any = false;
        for (int64_t atom = 0; atom < p.code[0]; ++atom) {
            bool all = true;
            for (int64_t terms = p.code[at++]; terms > 0; --terms) {
                const int64_t *term = p.code.data() + at;
                all = all && holds(term, i, j);
                at += size_t(TERM_LENGTH[*term]);
            }
            any = any || all;
        }
        return any;
    }

  private:
    const Problem &p;
    int64_t b, h;

    int64_t cu(int64_t slot, int64_t t) const { return int64_t(p.operands[size_t(slot)].get(t)); }

    int64_t document(int64_t slot, int64_t i, int64_t j) const {
        for (int64_t t = 0; t + 1 < p.operands[size_t(slot)].view.size[0]; ++t)
            if (cu(slot, t) <= i && i < cu(slot, t + 1) && cu(slot + 1, t) <= j && j < cu(slot + 1, t + 1)) return t;
        return NONE;
    }

    bool holds(const int64_t *term, int64_t i, int64_t j) const {
        if (*term == DOCUMENTS) return document(term[1], i, j) != NONE;
        if (*term == BLOCKS) return p.operands[size_t(term[2])].get(b, h, i / term[1], j / term[1]) != 0;
        if (*term == MASK) return p.operands[size_t(term[1])].get(b, h, i, j) != 0;
        const int64_t *bound = term + (*term == BOUND ? 3 : 2);
        int64_t q_length = p.q_length, k_length = p.k_length, symbol = 0;
        if (const int64_t frame = bound[3]; frame != NONE) {
            const int64_t t = document(frame, i, j);
            if (t == NONE) return false;
            i -= cu(frame, t);
            j -= cu(frame + 1, t);
            q_length = cu(frame, t + 1) - cu(frame, t);
            k_length = cu(frame + 1, t + 1) - cu(frame + 1, t);
        }
        if (bound[1] == END) symbol = k_length - q_length;
        else if (bound[1] >= 0) symbol = int64_t(p.operands[size_t(bound[1])].get(b));
        const int64_t limit = bound[0] + bound[2] * symbol;
        if (*term == STEP) return (j - i - limit) % term[1] == 0;
        if (*term == CHUNK) return floor_divide(i + limit, term[1]) == floor_divide(j, term[1]);
        const int64_t place = term[1] == 0 ? i : term[1] == 1 ? j : j - i;
        return term[2] == 0 ? place >= limit : place <= limit;
    }
};

// Whether dropout keeps weight (b, h, i, j).
inline bool kept(uint64_t seed, double dropout_p, int64_t b, int64_t h, int64_t i, int64_t j) {
    uint32_t c[] = {uint32_t(16 * (j / 64) + j % 16), uint32_t(i), uint32_t(h), uint32_t(b)};
    uint32_t k[] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; ++round, k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u) {
        const uint64_t x = uint64_t(c[0]) * 0xD2511F53u, y = uint64_t(c[2]) * 0xCD9E8D57u;
        const uint32_t next[] = {uint32_t(y >> 32) ^ c[1] ^ k[0], uint32_t(y), uint32_t(x >> 32) ^ c[3] ^ k[1],
                                 uint32_t(x)};
        std::copy(next, next + 4, c);
    }
    return c[j / 16 % 4] >= uint64_t(dropout_p * 4294967296.0);
}

// One query's weights, by key.
struct Row {
    std::vector<bool> counts;
    std::vector<double> weight; // before dropout
    std::vector<double> keep;   // what dropout multiplies it by
    std::vector<double> slope;  // of the capped score over the plain one
    double lse = -INFINITE;
    double largest = 0; // magnitude of the terms that a score is summed from
    // How far a weight may be off, relatively, from rounding in its score.
    double score_error = 0, error = 0;

    Row(const Problem &p, int64_t b, int64_t h, int64_t i) {
        const size_t n = size_t(p.k_length);
        counts.assign(n, false);
        weight.assign(n, 0);
        keep.assign(n, 1);
        slope.assign(n, 1);
        std::vector<double> score(n, -INFINITE);
        const Pairs pairs(p, b, h);
        double peak = p.sinks.given() ? p.sinks.get(h) : -INFINITE;
        for (size_t j = 0; j < n; ++j) {
            const int64_t k = int64_t(j);
            if (!pairs.counts(i, k)) continue;
            const double added = p.bias.given() ? p.bias.get(b, h, i, k) : 0;
            if (added == -INFINITE) continue;
            double dot = 0, magnitude = 0;
            for (int64_t d = 0; d < p.dim; ++d) {
                const double term = p.scale * p.query.get(b, h, i, d) * p.key_at(b, h, k, d);
                dot += term;
                magnitude += std::fabs(term);
            }
            if (p.softcap > 0) {
                const double capped = std::tanh(dot / p.softcap);
                slope[j] = 1 - capped * capped;
                dot = p.softcap * capped;
            }
            const double distance = p.slopes.given() ? p.slopes.get(b, h, i) * away(p, b, i, k) : 0;
            counts[j] = true;
            score[j] = dot + added - distance;
            if (p.dropout_p > 0) keep[j] = kept(p.seed, p.dropout_p, b, h, i, k) ? 1 / (1 - p.dropout_p) : 0;
            largest = std::max(largest, magnitude + std::fabs(added) + std::fabs(distance));
            peak = std::max(peak, score[j]);
        }
        if (p.sinks.given() && std::isfinite(p.sinks.get(h))) largest += std::fabs(p.sinks.get(h));
        score_error = SUM_ROUNDOFF[p.dtype] * (8 + 4 * largest);
        error = WEIGHT_ROUNDOFF[p.dtype] + score_error;
        if (peak == -INFINITE) return;
        // Equal terms, as of scale 0, all round the same way: in double 600 of them sum to less than the bound allows.
        long double total = p.sinks.given() ? std::exp(p.sinks.get(h) - peak) : 0;
        for (size_t j = 0; j < n; ++j) total += weight[j] = std::exp(score[j] - peak);
        for (size_t j = 0; j < n; ++j) weight[j] = double(weight[j] / total);
        lse = double(peak + std::log(total));
    }

    static double away(const Problem &p, int64_t b, int64_t i, int64_t j) {
        const double offset = p.query_offset.given() ? p.query_offset.get(b, i) : double(p.k_length - p.q_length);
        return std::fabs(double(i) + offset - double(j));
    }
};

// A number and the bound of the error that rounding may have left in it.
struct Bounded {
    double wanted = 0, bound = 0;
    bool holds(double found) const { return found == wanted || std::fabs(found - wanted) <= bound; }
};

inline Bounded output(const Problem &p, const Row &row, int64_t b, int64_t h, int64_t d) {
    double sum = 0, spread = 0;
    for (int64_t j = 0; j < p.k_length; ++j) {
        const double weight = row.weight[size_t(j)] * row.keep[size_t(j)];
        if (weight == 0) continue;
        const double term = weight * p.value_at(b, h, j, d);
        sum += term;
        spread += std::fabs(term);
    }
    return {sum, 8 * (ROUNDOFF[p.dtype] * std::fabs(sum) + row.error * spread) + SMALLEST[p.dtype]};
}

inline Bounded lse(const Problem &p, const Row &row) {
    // The exponential of the bfloat16 kernels errs by 2.6e-6.
    const double exponential = p.dtype == HEEDFUL_BFLOAT16 ? 0x1p-18 : 0;
    if (row.lse == -INFINITE) return {row.lse, 0};
    return {row.lse, 8 * (row.score_error + SUM_ROUNDOFF[p.dtype] * std::fabs(row.lse)) + exponential};
}

inline Bounded weight(const Problem &p, const Row &row, int64_t j) {
    const double x = row.weight[size_t(j)] * row.keep[size_t(j)];
    return {x, 8 * ((ROUNDOFF[p.dtype] + row.error) * x + FLUSHED[p.dtype]) + SMALLEST[p.dtype]};
}

// What arrives at the outputs of a call; weights and lse may be left out.
struct Arriving {
    Tensor out, lse, weights;
};

// The gradients of a call, in contiguous order.
struct Gradients {
    std::vector<Bounded> query, key, value, delta, bias, slopes;

    Gradients(const Problem &p, const Arriving &arriving)
        : query(size_t(p.batch * p.heads * p.q_length * p.dim)), key(size_t(p.batch * p.kv_heads * p.k_length * p.dim)),
          value(size_t(p.batch * p.kv_heads * p.k_length * p.value_dim)), delta(size_t(p.batch * p.heads * p.q_length)),
          slopes(delta.size()) {
        if (p.bias.given()) {
            const int64_t *size = p.bias.view.size;
            bias.resize(size_t(size[0] * size[1] * size[2] * p.k_length));
        }
        for (int64_t b = 0; b < p.batch; ++b)
            for (int64_t h = 0; h < p.heads; ++h)
                for (int64_t i = 0; i < p.q_length; ++i) add_row(p, arriving, b, h, i);
        const double roundoff = ROUNDOFF[p.dtype], sums = SUM_ROUNDOFF[p.dtype];
        for (std::vector<Bounded> *all : {&query, &key, &value})
            for (Bounded &x : *all) x.bound = 8 * (x.bound + roundoff * std::fabs(x.wanted)) + SMALLEST[p.dtype];
        for (std::vector<Bounded> *all : {&delta, &bias, &slopes})
            for (Bounded &x : *all) x.bound = 8 * (x.bound + sums * std::fabs(x.wanted)) + FLUSHED[p.dtype];
    }

    // What the caller passes as the gradient of lse where weights were returned: less the row sum of theirs.
    static double grad_lse(const Problem &p, const Arriving &arriving, const Row &row, int64_t b, int64_t h,
                           int64_t i) {
        double sum = arriving.lse.given() ? arriving.lse.get(b, h, i) : 0;
        if (!arriving.weights.given()) return sum;
        for (int64_t j = 0; j < p.k_length; ++j)
            sum -= row.weight[size_t(j)] * row.keep[size_t(j)] * arriving.weights.get(b, h, i, j);
        return sum;
    }

  private:
    static void add(Bounded &sum, double x, double error) {
        sum.wanted += x;
        sum.bound += error;
    }

    void add_row(const Problem &p, const Arriving &arriving, int64_t b, int64_t h, int64_t i) {
        const Row row(p, b, h, i);
        const size_t n = size_t(p.k_length);
        const double weight_error = 2 * row.error + ROUNDOFF[p.dtype], flushed = FLUSHED[p.dtype];
        std::vector<double> arrived(n, 0), reach(n, 0);
        double outputs = 0, output_reach = 0, weights_reach = 0;
        for (size_t j = 0; j < n; ++j) {
            if (!row.counts[j]) continue;
            for (int64_t d = 0; d < p.value_dim; ++d) {
                const double term = arriving.out.get(b, h, i, d) * p.value_at(b, h, int64_t(j), d);
                arrived[j] += term;
                reach[j] += std::fabs(term);
            }
            const double kept = row.weight[j] * row.keep[j];
            outputs += kept * arrived[j];
            output_reach += kept * reach[j];
            if (!arriving.weights.given()) continue;
            const double direct = arriving.weights.get(b, h, i, int64_t(j));
            arrived[j] += direct;
            reach[j] += std::fabs(direct);
            weights_reach += kept * std::fabs(direct);
        }
        const double later = grad_lse(p, arriving, row, b, h, i);
        const double later_reach = weights_reach + (arriving.lse.given() ? std::fabs(arriving.lse.get(b, h, i)) : 0);
        const double shift = outputs - later, row_reach = output_reach + later_reach;
        double rounded = 0; // what the rounding of subnormal outputs leaves in delta
        for (int64_t d = 0; d < p.value_dim; ++d)
            rounded += SMALLEST[p.dtype] * std::fabs(arriving.out.get(b, h, i, d));
        const size_t at = size_t((b * p.heads + h) * p.q_length + i);
        if (row.lse == -INFINITE) add(delta[at], 0, std::fabs(later)); // nothing depends on it
        else add(delta[at], shift, weight_error * output_reach + SUM_ROUNDOFF[p.dtype] * later_reach + rounded);
        const int64_t kv_head = h / (p.heads / p.kv_heads);
        for (size_t j = 0; j < n; ++j) {
            if (!row.counts[j]) continue;
            const int64_t k = int64_t(j);
            const double weight = row.weight[j], kept = weight * row.keep[j];
            const double size = row.keep[j] * reach[j] + row_reach;
            const double ds = weight * (row.keep[j] * arrived[j] - shift);
            const double ds_error = (weight_error * weight + flushed) * size + weight * rounded;
            const double cap =
                p.softcap > 0 ? 4 * SUM_ROUNDOFF[p.dtype] + 2 * row.slope[j] * row.score_error / p.softcap : 0;
            const double dz = ds * row.slope[j], dz_error = ds_error * row.slope[j] + weight * size * cap;
            const double scale = p.scale, magnitude = std::fabs(p.scale);
            const size_t keys = size_t((b * p.kv_heads + kv_head) * p.k_length + k);
            for (int64_t d = 0; d < p.dim; ++d) {
                const double q = p.query.get(b, h, i, d), x = p.key_at(b, h, k, d);
                add(query[at * size_t(p.dim) + size_t(d)], scale * dz * x, magnitude * dz_error * std::fabs(x));
                add(key[keys * size_t(p.dim) + size_t(d)], scale * dz * q, magnitude * dz_error * std::fabs(q));
            }
            for (int64_t d = 0; d < p.value_dim; ++d) {
                const double g = arriving.out.get(b, h, i, d);
                add(value[keys * size_t(p.value_dim) + size_t(d)], kept * g,
                    (row.error * kept + flushed) * std::fabs(g));
            }
            if (p.slopes.given()) {
                const double distance = Row::away(p, b, i, k);
                add(slopes[at], -ds * distance, ds_error * distance);
            }
            if (p.bias.given()) {
                const int64_t *n_bias = p.bias.view.size;
                const int64_t line = ((n_bias[0] == 1 ? 0 : b) * n_bias[1] + (n_bias[1] == 1 ? 0 : h)) * n_bias[2] +
                                     (n_bias[2] == 1 ? 0 : i);
                add(bias[size_t(line * p.k_length + k)], ds, ds_error);
            }
        }
    }
};

} // namespace reference
