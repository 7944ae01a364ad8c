// Random calls: shapes, strides, schedules, features, pages. Every choice is drawn from the bytes that a Source was
// given, then from its seed, so that the fuzz target and the tests make calls in one way.
#pragma once

#include <random>
#include <thread>

#include "reference.h"

namespace reference {

class Source {
  public:
    explicit Source(uint64_t seed) : generator_(seed) {}
    Source(const uint8_t *data, size_t size) : data_(data), size_(size), generator_(size) {}

    int64_t pick(int64_t low, int64_t high) {
        const uint64_t span = uint64_t(high) - uint64_t(low) + 1;
        uint64_t drawn = 0;
        if (size_ == 0) {
            drawn = generator_();
        } else {
            for (uint64_t reach = 1; size_ > 0 && reach < span && reach < uint64_t(1) << 56; reach <<= 8, --size_)
                drawn = drawn << 8 | *data_++;
        }
        return int64_t(uint64_t(low) + (span ? drawn % span : drawn));
    }
    bool once_in(int64_t n) { return pick(1, n) == n; }
    double normal() { return std::normal_distribution<double>()(generator_); }

  private:
    const uint8_t *data_ = nullptr;
    size_t size_ = 0;
    std::mt19937_64 generator_;
};

inline void fill(Source &source, Tensor &tensor) {
    tensor.each([&](int64_t a, int64_t b, int64_t c, int64_t d) { tensor.set(source.normal(), a, b, c, d); });
}

// Memory in one of the ways that callers have it: gaps, columns apart, length before heads.
inline Tensor strided(Source &source, int32_t dtype, const std::vector<int64_t> &size, bool may_repeat = false) {
    std::vector<size_t> order = {0, 1, 2, 3};
    if (source.once_in(3)) std::swap(order[1], order[2]);
    if (source.once_in(12)) std::swap(order[2], order[3]);
    int64_t next = source.once_in(6) ? 2 : 1;
    std::vector<int64_t> stride(4);
    for (size_t place = 4; place-- > 0;) {
        const size_t axis = order[place];
        stride[axis] = next;
        next *= std::max<int64_t>(size[axis], 1);
        if (source.once_in(3)) next += source.pick(1, 5);
        if (may_repeat && axis < 2 && source.once_in(12)) stride[axis] = 0;
    }
    return Tensor(dtype, size, stride);
}

typedef std::vector<std::vector<int64_t>> Terms; // of one atom

inline std::vector<Terms> both(const std::vector<Terms> &a, const std::vector<Terms> &b) {
    std::vector<Terms> result;
    for (const Terms &x : a)
        for (const Terms &y : b) {
            result.push_back(x);
            result.back().insert(result.back().end(), y.begin(), y.end());
        }
    return result;
}

inline int64_t add_int32(Problem &p, const std::vector<int64_t> &values) {
    Tensor tensor(HEEDFUL_INT32, {int64_t(values.size())});
    for (size_t i = 0; i < values.size(); ++i) tensor.set(double(values[i]), int64_t(i));
    p.operands.push_back(tensor);
    return int64_t(p.operands.size()) - 1;
}

inline int64_t add_per_item(Source &source, Problem &p, int64_t low, int64_t high) {
    std::vector<int64_t> values(size_t(source.once_in(3) ? 1 : p.batch));
    for (int64_t &value : values) value = source.pick(low, high);
    return add_int32(p, values);
}

inline int64_t add_map(Source &source, Problem &p, int64_t rows, int64_t columns, int64_t sparsity) {
    const std::vector<int64_t> size = {source.once_in(2) ? 1 : p.batch, source.once_in(2) ? 1 : p.heads, rows, columns};
    Tensor map = source.once_in(3) ? strided(source, HEEDFUL_BOOL, size) : Tensor(HEEDFUL_BOOL, size);
    std::fill(map.memory.begin(), map.memory.end(), char(0));
    map.each([&](int64_t a, int64_t b, int64_t c, int64_t d) { map.set(source.once_in(sparsity), a, b, c, d); });
    p.operands.push_back(map);
    return int64_t(p.operands.size()) - 1;
}

inline std::vector<Terms> random_pattern(Source &source, Problem &p, int depth);

// Documents that follow each other, their queries and keys split at random, and a pattern inside each.
inline std::vector<Terms> random_documents(Source &source, Problem &p) {
    std::vector<int64_t> cu_q = {0}, cu_k = {0};
    for (int64_t left = source.pick(1, 5); left > 0; --left) {
        cu_q.push_back(left == 1 && source.once_in(2) ? p.q_length : source.pick(cu_q.back(), p.q_length));
        cu_k.push_back(left == 1 && source.once_in(2) ? p.k_length : source.pick(cu_k.back(), p.k_length));
    }
    const int64_t slot = add_int32(p, cu_q);
    add_int32(p, cu_k);
    Terms atom = {{DOCUMENTS, slot}};
    if (source.once_in(2)) atom.push_back({BOUND, 2, 1, 0, END, 1, slot});
    if (source.once_in(4)) atom.push_back({BOUND, 2, 0, -source.pick(0, 20), END, 1, slot});
    if (source.once_in(6)) atom.push_back({STEP, source.pick(1, 4), source.pick(-3, 3), END, 1, slot});
    if (source.once_in(6)) atom.push_back({CHUNK, source.pick(1, 20), 0, END, 1, slot});
    return {atom};
}

inline std::vector<Terms> random_pattern(Source &source, Problem &p, int depth) {
    const int64_t radius = source.pick(0, source.once_in(4) ? 300 : 40), size = source.pick(1, 70);
    // A diagonal is counted from END, from a number or from a tensor.
    const auto bound = [&](int64_t constant) -> std::vector<int64_t> {
        const int64_t kind = source.pick(0, 5);
        if (kind == 0) return {constant + source.pick(-5, 5), NONE, 1, NONE};
        if (kind == 1) return {constant, add_per_item(source, p, -10, p.k_length), 1, NONE};
        return {constant, END, 1, NONE};
    };
    const auto term = [](std::vector<int64_t> head, const std::vector<int64_t> &tail) {
        head.insert(head.end(), tail.begin(), tail.end());
        return head;
    };
    switch (source.pick(0, depth > 0 ? 13 : 10)) {
    case 0:
        return {{}};
    case 1:
        return {{term({BOUND, 2, 1}, bound(0))}};
    case 2:
        return {{term({BOUND, 2, 0}, bound(-radius)), term({BOUND, 2, 1}, bound(source.once_in(2) ? 0 : radius))}};
    case 3:
        return {{{BOUND, 2, 0, -size * 3, END, 1, NONE},
                 {BOUND, 2, 1, size * 3, END, 1, NONE},
                 term({STEP, source.pick(1, 9)}, bound(source.pick(-4, 4)))}};
    case 4:
        return {{term({CHUNK, size}, bound(0))}};
    case 5:
        return {{{BOUND, 1, 1, source.pick(0, 20), NONE, 1, NONE}}};
    case 6: // global rows and columns
        return {{{BOUND, 1, 1, source.pick(0, 3), NONE, 1, NONE}}, {{BOUND, 0, 1, source.pick(0, 3), END, -1, NONE}}};
    case 7:
        return {{{BLOCKS, size, add_map(source, p, p.q_length / size + 1, p.k_length / size + 1, 3)}}};
    case 8: // padding
        return {{{BOUND, 1, 0, 0, add_per_item(source, p, 0, p.k_length), 1, NONE},
                 {BOUND, 1, 1, -1, add_per_item(source, p, 0, p.k_length), 1, NONE}}};
    case 9:
        return random_documents(source, p);
    case 10: {
        const int64_t rows = source.once_in(4) ? 1 : p.q_length, columns = source.once_in(4) ? 1 : p.k_length;
        return {{{MASK, add_map(source, p, rows, columns, source.pick(1, 3))}}};
    }
    case 11:
        return both(random_pattern(source, p, depth - 1), random_pattern(source, p, depth - 1));
    default: {
        std::vector<Terms> result = random_pattern(source, p, depth - 1);
        for (const Terms &atom : random_pattern(source, p, depth - 1)) result.push_back(atom);
        return result;
    }
    }
}

inline void set_code(Problem &p, const std::vector<Terms> &atoms) {
    p.code.clear();
    if (atoms.size() == 1 && atoms[0].empty()) return;
    p.code.push_back(int64_t(atoms.size()));
    for (const Terms &atom : atoms) {
        p.code.push_back(int64_t(atom.size()));
        for (const auto &term : atom) p.code.insert(p.code.end(), term.begin(), term.end());
    }
}

inline void add_features(Source &source, Problem &p) {
    const auto type = [&] { return source.once_in(2) ? p.dtype : int32_t(HEEDFUL_FLOAT32); };
    if (source.once_in(3)) p.softcap = 0.5 * double(source.pick(1, 40));
    if (source.once_in(3)) {
        const auto one_or = [&](int64_t size) { return source.once_in(3) ? 1 : size; };
        p.bias = strided(source, type(), {one_or(p.batch), one_or(p.heads), one_or(p.q_length), one_or(p.k_length)});
        const bool excludes = source.once_in(2);
        p.bias.each([&](int64_t a, int64_t b, int64_t c, int64_t d) {
            p.bias.set(excludes && source.once_in(5) ? -INFINITE : source.normal(), a, b, c, d);
        });
    }
    if (source.once_in(3)) {
        const int64_t items = source.once_in(2) ? 1 : p.batch, length = p.q_length, gap = source.pick(1, 2);
        const bool per_query = source.once_in(3);
        p.slopes = per_query ? Tensor(type(), {items, p.heads, length}, {gap * p.heads * length, gap * length, gap})
                             : Tensor(type(), {items, p.heads});
        p.slopes.each(
            [&](int64_t b, int64_t h, int64_t i, int64_t) { p.slopes.set(1.0 / double(source.pick(1, 64)), b, h, i); });
        if (source.once_in(3)) {
            p.query_offset = per_query ? Tensor(HEEDFUL_INT32, {items, length}, {gap * length, gap})
                                       : Tensor(HEEDFUL_INT32, {items});
            p.query_offset.each([&](int64_t b, int64_t i, int64_t, int64_t) {
                p.query_offset.set(double(source.pick(-20, 60)), b, i);
            });
        }
    }
    if (source.once_in(3)) {
        p.sinks = Tensor(type(), {p.heads});
        fill(source, p.sinks);
    }
    if (source.once_in(3)) {
        p.dropout_p = double(source.pick(1, 9)) / 10;
        p.seed = uint64_t(source.pick(0, std::numeric_limits<int64_t>::max()));
    }
}

struct Limits {
    int64_t q_length = 60, k_length = 90, long_k_length = 600, dim = 40;
    bool features = true, pages = false;
};

// Keys that no query of their batch item may see hold NaN, and so do pages that nobody reaches, whose numbers are
// nonsense.
inline void poison_unseen(Source &source, Problem &p) {
    for (int64_t b = 0; b < p.batch; ++b) {
        std::vector<bool> seen(size_t(p.k_length), false);
        for (int64_t h = 0; h < p.heads; ++h) {
            const Pairs pairs(p, b, h);
            for (int64_t j = 0; j < p.k_length; ++j)
                for (int64_t i = 0; i < p.q_length && !seen[size_t(j)]; ++i) seen[size_t(j)] = pairs.counts(i, j);
        }
        if (p.page) {
            for (int64_t first = 0; first < p.k_length; first += p.page) {
                bool any = false;
                for (int64_t j = first; j < first + p.page; ++j) any = any || seen[size_t(j)];
                if (!any) p.pages.set(source.once_in(2) ? -1 : 1 << 30, b, first / p.page);
            }
            continue; // a block may serve several items
        }
        if (p.key.view.stride[0] == 0 || p.value.view.stride[0] == 0) continue;
        for (int64_t j = 0; j < p.k_length; ++j) {
            if (seen[size_t(j)]) continue;
            for (int64_t h = 0; h < p.kv_heads; ++h) {
                for (int64_t d = 0; d < p.dim; ++d) p.key.set(NAN, b, h, j, d);
                for (int64_t d = 0; d < p.value_dim; ++d) p.value.set(source.once_in(2) ? NAN : INFINITE, b, h, j, d);
            }
        }
    }
}

inline void add_inputs(Source &source, Problem &p) {
    p.query = strided(source, p.dtype, {p.batch, p.heads, p.q_length, p.dim}, true);
    const int64_t blocks = p.batch * p.k_length / std::max<int64_t>(p.page, 1) + 2;
    const std::vector<int64_t> places = p.page ? std::vector<int64_t>{blocks, p.kv_heads, p.page}
                                               : std::vector<int64_t>{p.batch, p.kv_heads, p.k_length};
    p.key = strided(source, p.dtype, {places[0], places[1], places[2], p.dim}, !p.page);
    p.value = strided(source, p.dtype, {places[0], places[1], places[2], p.value_dim}, !p.page);
    for (Tensor *tensor : {&p.query, &p.key, &p.value}) fill(source, *tensor);
    if (p.page) {
        p.pages = Tensor(HEEDFUL_INT32, {p.batch, p.k_length / p.page});
        p.pages.each(
            [&](int64_t b, int64_t n, int64_t, int64_t) { p.pages.set(double(source.pick(0, blocks - 1)), b, n); });
    }
    if (source.once_in(2)) poison_unseen(source, p);
    p.seal();
}

inline Problem random_problem(Source &source, const Limits &limits) {
    Problem p;
    p.dtype = int32_t(source.pick(HEEDFUL_FLOAT32, HEEDFUL_FLOAT64));
    p.batch = source.once_in(40) ? 0 : source.pick(1, 3);
    p.kv_heads = source.pick(1, 3);
    p.heads = p.kv_heads * (source.once_in(4) ? source.pick(4, 9) : source.pick(1, 3));
    p.q_length = source.once_in(3) ? source.pick(0, 4) : source.pick(1, limits.q_length);
    p.k_length = source.once_in(4) ? source.pick(0, limits.long_k_length) : source.pick(0, limits.k_length);
    p.dim = source.pick(1, limits.dim);
    p.value_dim = source.once_in(2) ? p.dim : source.pick(1, limits.dim);
    p.scale = source.once_in(10)
                  ? 0
                  : (source.once_in(6) ? -1 : 1) * (source.once_in(8) ? 5.0 : 1.0 / std::sqrt(double(p.dim)));
    if (limits.pages && source.once_in(2)) {
        const int64_t sizes[] = {1, 3, 16, 64, 256};
        p.page = sizes[source.pick(0, 4)];
        p.k_length = (p.k_length + p.page - 1) / p.page * p.page;
    }
    set_code(p, random_pattern(source, p, 2));
    if (limits.features && source.once_in(2)) add_features(source, p);

    add_inputs(source, p);
    return p;
}

inline void run_on_threads(void *, int64_t count, void (*body)(void *, int64_t), void *argument) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) threads.emplace_back(body, argument, i);
    for (std::thread &thread : threads) thread.join();
}

} // namespace reference
