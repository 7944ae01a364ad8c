// One call of the C interface per input: random shapes, strides, schedules, features, pages and types. Half of the
// calls are right and are compared with plain loops in double; in the other half the schedule or a view is damaged,
// and the call may be refused or answered, but must stay inside the memory that it was given.
//
// LLVMFuzzerTestOneInput is libFuzzer's; driver.cpp stands in for libFuzzer where only g++ is at hand.

#include <cstdio>
#include <cstdlib>

#include "../tests/random_problem.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

namespace {

using reference::Limits;
using reference::Problem;
using reference::Row;
using reference::Source;
using reference::Tensor;

void require(bool condition, const char *what) {
    if (condition) return;
    std::fprintf(stderr, "%s (last message: %s)\n", what, heedful_error_message());
    std::abort();
}

int64_t odd_number(Source &source) {
    const int64_t edges[] = {std::numeric_limits<int64_t>::min(),
                             std::numeric_limits<int64_t>::max(),
                             -1,
                             -2,
                             0,
                             int64_t(1) << 62,
                             -(int64_t(1) << 62),
                             int64_t(1) << 40,
                             int64_t(1) << 32,
                             std::numeric_limits<int32_t>::max(),
                             std::numeric_limits<int32_t>::min()};
    return source.once_in(2) ? source.pick(-10, 10) : edges[source.pick(0, int64_t(std::size(edges)) - 1)];
}

void damage_code(Source &source, std::vector<int64_t> &code) {
    for (int64_t times = source.pick(1, 4); times > 0; --times) {
        const int64_t place = source.pick(0, int64_t(code.size()));
        switch (source.pick(0, 4)) {
        case 0:
            code.resize(size_t(place));
            break;
        case 1:
            code.insert(code.begin() + place, odd_number(source));
            break;
        case 2:
            if (!code.empty()) code.erase(code.begin() + source.pick(0, int64_t(code.size()) - 1));
            break;
        default:
            if (!code.empty()) code[size_t(source.pick(0, int64_t(code.size()) - 1))] = odd_number(source);
        }
    }
}

// A view that tells less than the truth, so that no right reading of it leaves its memory.
void damage_view(Source &source, heedful_tensor &view) {
    const int64_t axis = source.pick(0, 3);
    switch (source.pick(0, 4)) {
    case 0:
        view.size[axis] = source.pick(-1, std::max<int64_t>(view.size[axis], 0));
        break;
    case 1:
        view.ndim = int32_t(source.pick(-1, view.ndim));
        break;
    case 2:
        view.dtype = view.dtype == HEEDFUL_BOOL ? int32_t(source.pick(7, 1000)) : int32_t(HEEDFUL_BOOL);
        break;
    case 3:
        view.data = nullptr;
        break;
    default:
        view.stride[axis] = 0;
    }
}

struct Outputs {
    Tensor out, lse, weights, counts, grad_query, grad_key, grad_value, delta, grad_bias, grad_slopes;

    explicit Outputs(const Problem &p)
        : out(p.dtype, {p.batch, p.heads, p.q_length, p.value_dim}), lse(p.sum_dtype(), {p.batch, p.heads, p.q_length}),
          weights(p.dtype, {p.batch, p.heads, p.q_length, p.k_length}),
          counts(HEEDFUL_INT64, {p.batch, p.heads, p.q_length}),
          grad_query(p.dtype, {p.batch, p.heads, p.q_length, p.dim}),
          grad_key(p.dtype, {p.batch, p.kv_heads, p.k_length, p.dim}),
          grad_value(p.dtype, {p.batch, p.kv_heads, p.k_length, p.value_dim}), delta(lse) {
        if (p.bias.given()) {
            const int64_t *size = p.bias.view.size;
            grad_bias = Tensor(p.sum_dtype(), {size[0], size[1], size[2], p.k_length});
        }
        if (p.slopes.given()) grad_slopes = lse;
    }
};

// The calls, and whether they were answered; `damaged` (null for none) may spoil any view of them.
bool forward(const Problem &p, Outputs &o, Source *damaged) {
    heedful_forward call = {p.query.seen(), p.key.seen(), p.value.seen(), o.out.seen(),  o.lse.seen(),
                            p.scale,        p.schedule(), p.features(),   p.pages.seen()};
    if (damaged) {
        heedful_tensor *const views[] = {&call.query,
                                         &call.key,
                                         &call.value,
                                         &call.out,
                                         &call.lse,
                                         &call.pages,
                                         &call.features.bias,
                                         &call.features.alibi_slopes,
                                         &call.features.query_offset,
                                         &call.features.sinks};
        damage_view(*damaged, *views[damaged->pick(0, int64_t(std::size(views)) - 1)]);
    }
    return heedful_attention_forward(&call, nullptr) == HEEDFUL_OK;
}

bool backward(const Problem &p, Outputs &o, const Tensor &grad_out, Source *damaged) {
    heedful_backward call = {};
    call.query = p.query.seen(), call.key = p.key.seen(), call.value = p.value.seen();
    call.out = o.out.seen(), call.lse = o.lse.seen(), call.grad_out = grad_out.seen();
    call.grad_query = o.grad_query.seen(), call.grad_key = o.grad_key.seen(), call.grad_value = o.grad_value.seen();
    call.delta = o.delta.seen(), call.grad_bias = o.grad_bias.seen(), call.grad_slopes = o.grad_slopes.seen();
    call.scale = p.scale;
    call.schedule = p.schedule();
    call.features = p.features();
    if (damaged) {
        heedful_tensor *const views[] = {&call.query,      &call.key,          &call.value,        &call.out,
                                         &call.lse,        &call.grad_out,     &call.grad_query,   &call.grad_key,
                                         &call.grad_value, &call.delta,        &call.grad_bias,    &call.grad_slopes,
                                         &call.grad_lse,   &call.grad_weights, &call.features.bias};
        damage_view(*damaged, *views[damaged->pick(0, int64_t(std::size(views)) - 1)]);
    }
    return heedful_attention_backward(&call, nullptr) == HEEDFUL_OK;
}

bool weights(const Problem &p, Outputs &o, bool counting, Source *damaged) {
    heedful_weights call = {};
    call.query = p.query.seen(), call.key = p.key.seen(), call.lse = o.lse.seen();
    (counting ? call.counts : call.weights) = (counting ? o.counts : o.weights).seen();
    call.scale = p.scale;
    call.schedule = p.schedule();
    call.features = p.features();
    if (damaged) {
        heedful_tensor *const views[] = {&call.query, &call.key, &call.lse, &call.weights, &call.counts};
        damage_view(*damaged, *views[damaged->pick(0, int64_t(std::size(views)) - 1)]);
    }
    return heedful_attention_weights(&call, nullptr) == HEEDFUL_OK;
}

void check_gradient(const Tensor &found, const std::vector<reference::Bounded> &expected, const char *what) {
    size_t index = 0;
    found.each([&](int64_t a, int64_t b, int64_t c, int64_t d) {
        require(expected[index++].holds(found.get(a, b, c, d)), what);
    });
}

void check(const Problem &p, const Outputs &o, const Tensor &grad_out) {
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < p.heads; ++h)
            for (int64_t i = 0; i < p.q_length; ++i) {
                const Row row(p, b, h, i);
                require(reference::lse(p, row).holds(o.lse.get(b, h, i)), "lse is wrong");
                for (int64_t d = 0; d < p.value_dim; ++d)
                    require(reference::output(p, row, b, h, d).holds(o.out.get(b, h, i, d)), "out is wrong");
                if (p.page) continue;
                double counted = 0;
                for (int64_t j = 0; j < p.k_length; ++j) {
                    require(reference::weight(p, row, j).holds(o.weights.get(b, h, i, j)), "weights are wrong");
                    counted += row.counts[size_t(j)];
                }
                require(o.counts.get(b, h, i) == counted, "counts are wrong");
            }
    if (p.page) return;
    const reference::Gradients expected(p, {grad_out, {}, {}});
    check_gradient(o.grad_query, expected.query, "grad_query is wrong");
    check_gradient(o.grad_key, expected.key, "grad_key is wrong");
    check_gradient(o.grad_value, expected.value, "grad_value is wrong");
    check_gradient(o.delta, expected.delta, "delta is wrong");
    if (p.bias.given()) check_gradient(o.grad_bias, expected.bias, "grad_bias is wrong");
    if (p.slopes.given()) check_gradient(o.grad_slopes, expected.slopes, "grad_slopes is wrong");
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Source source(data, size);
    Limits limits;
    limits.q_length = 30, limits.k_length = 40, limits.long_k_length = 600, limits.dim = 20;
    limits.pages = true;
    Problem p = reference::random_problem(source, limits);
    Outputs o(p);
    Tensor grad_out = reference::strided(source, p.dtype, {p.batch, p.heads, p.q_length, p.value_dim}, true);
    reference::fill(source, grad_out);

    if (source.once_in(2)) {
        require(forward(p, o, nullptr), "a right forward call was refused");
        if (!p.page) {
            require(weights(p, o, false, nullptr), "a right call for weights was refused");
            require(weights(p, o, true, nullptr), "a right call for counts was refused");
            require(backward(p, o, grad_out, nullptr), "a right backward call was refused");
        }
        check(p, o, grad_out);
        return 0;
    }

    // A damaged schedule may reach every page.
    if (p.page)
        p.pages.each([&](int64_t b, int64_t n, int64_t, int64_t) {
            p.pages.set(double(source.pick(0, p.key.view.size[0] - 1)), b, n);
        });
    Source *damaged = nullptr;
    if (const int64_t way = source.pick(0, 3); way == 0) {
        damaged = &source;
    } else if (way == 1 && !p.operands.empty()) {
        damage_view(source, p.operand_views[size_t(source.pick(0, int64_t(p.operands.size()) - 1))]);
    } else {
        damage_code(source, p.code);
    }
    const bool answered = forward(p, o, damaged);
    require(answered || heedful_error_message()[0] != '\0', "a call was refused without a message");
    if (p.page) return 0;
    // What a refused call left unwritten stands in for its lse.
    weights(p, o, source.once_in(2), damaged);
    backward(p, o, grad_out, damaged);
    if (damaged) return 0;
    const heedful_schedule schedule = p.schedule();
    std::vector<uint8_t> mask(size_t(p.q_length * p.k_length + 1));
    heedful_schedule_mask(&schedule, p.batch, source.pick(-1, p.batch), source.pick(-1, p.heads - 1), p.q_length,
                          p.k_length, mask.data());
    const int64_t tile_q = source.pick(-1, 26), tile_k = int64_t(1) << source.pick(0, 9), least = 1;
    std::vector<uint8_t> tiles(size_t((p.q_length / std::max(tile_q, least) + 1) * (p.k_length / tile_k + 1)));
    heedful_schedule_tiles(&schedule, p.batch, 0, 0, p.q_length, p.k_length, tile_q, tile_k, tiles.data());
    return 0;
}
