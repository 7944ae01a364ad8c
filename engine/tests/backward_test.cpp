// The backward call against plain loops in double, through out, lse and weights, with every feature; and the same
// bits for any number of threads.

#include "checks.h"

namespace {

struct Backward {
    Tensor query, key, value, delta, bias, slopes;
    heedful_status status;
    std::string message;

    // The gradients lie in memory as `like`: by turns contiguous and with gaps.
    Backward(const Problem &p, const Forward &forward, const reference::Arriving &arriving, const Tensor &grad_lse,
             uint64_t like, int64_t threads)
        : delta(p.sum_dtype(), {p.batch, p.heads, p.q_length}) {
        Source source(like);
        const auto made = [&](int64_t heads, int64_t length, int64_t dim) {
            const std::vector<int64_t> size = {p.batch, heads, length, dim};
            return like % 2 ? Tensor(p.dtype, size) : reference::strided(source, p.dtype, size);
        };
        query = made(p.heads, p.q_length, p.dim);
        key = made(p.kv_heads, p.k_length, p.dim);
        value = made(p.kv_heads, p.k_length, p.value_dim);
        if (p.bias.given()) {
            const int64_t *size = p.bias.view.size;
            bias = Tensor(p.sum_dtype(), {size[0], size[1], size[2], p.k_length});
        }
        if (p.slopes.given()) slopes = Tensor(p.sum_dtype(), {p.batch, p.heads, p.q_length});
        const heedful_backward call = {
            p.query.seen(),     p.key.seen(),        p.value.seen(),  forward.out.seen(),
            forward.lse.seen(), arriving.out.seen(), grad_lse.seen(), arriving.weights.seen(),
            query.seen(),       key.seen(),          value.seen(),    delta.seen(),
            bias.seen(),        slopes.seen(),       p.scale,         p.schedule(),
            p.features()};
        heedful_threads storage;
        status = heedful_attention_backward(&call, threads_of(threads, storage));
        if (status != HEEDFUL_OK) message = heedful_error_message();
    }

    bool same_bits(const Backward &other) const {
        const Tensor Backward::*const all[] = {&Backward::query, &Backward::key,  &Backward::value,
                                               &Backward::delta, &Backward::bias, &Backward::slopes};
        for (const auto member : all)
            if ((this->*member).memory != (other.*member).memory) return false;
        return true;
    }
};

bool check_gradient(const Tensor &found, const std::vector<reference::Bounded> &expected, const std::string &what) {
    size_t index = 0;
    bool all = true;
    found.each([&](int64_t a, int64_t b, int64_t c, int64_t d) {
        const reference::Bounded &wanted = expected[index++];
        if (all && !wanted.holds(found.get(a, b, c, d)))
            all = fail_bounded(found.get(a, b, c, d), wanted, what + at({a, b, c, d}));
    });
    return all;
}

reference::Arriving random_arriving(Source &source, const Problem &p) {
    reference::Arriving arriving;
    arriving.out = reference::strided(source, p.dtype, {p.batch, p.heads, p.q_length, p.value_dim}, true);
    reference::fill(source, arriving.out);
    if (source.once_in(3)) {
        arriving.lse = Tensor(p.sum_dtype(), {p.batch, p.heads, p.q_length});
        reference::fill(source, arriving.lse);
    }
    if (source.once_in(4)) {
        arriving.weights = reference::strided(source, p.dtype, {p.batch, p.heads, p.q_length, p.k_length}, true);
        reference::fill(source, arriving.weights);
    }
    return arriving;
}

bool check_backward(Source &source, const Problem &p, const std::string &what) {
    const Forward forward(p, 1);
    EXPECT(forward.status == HEEDFUL_OK, what + ": forward: " + forward.message);
    const reference::Arriving arriving = random_arriving(source, p);
    Tensor grad_lse;
    if (arriving.lse.given() || arriving.weights.given()) {
        grad_lse = Tensor(p.sum_dtype(), {p.batch, p.heads, p.q_length});
        grad_lse.each([&](int64_t b, int64_t h, int64_t i, int64_t) {
            grad_lse.set(reference::Gradients::grad_lse(p, arriving, Row(p, b, h, i), b, h, i), b, h, i);
        });
    }
    const uint64_t like = uint64_t(source.pick(1, 1000));
    const Backward found(p, forward, arriving, grad_lse, like, 1);
    EXPECT(found.status == HEEDFUL_OK, what + ": " + found.message);
    const reference::Gradients expected(p, arriving);
    if (!check_gradient(found.delta, expected.delta, what + ": delta") ||
        !check_gradient(found.query, expected.query, what + ": grad_query") ||
        !check_gradient(found.key, expected.key, what + ": grad_key") ||
        !check_gradient(found.value, expected.value, what + ": grad_value"))
        return false;
    if (p.bias.given() && !check_gradient(found.bias, expected.bias, what + ": grad_bias")) return false;
    if (p.slopes.given() && !check_gradient(found.slopes, expected.slopes, what + ": grad_slopes")) return false;
    const int64_t threads = source.pick(2, 5);
    const Backward again(p, forward, arriving, grad_lse, like, threads);
    EXPECT(again.status == HEEDFUL_OK, what + ": " + again.message);
    EXPECT(again.same_bits(found), what + ": " + std::to_string(threads) + " threads give other bits than one");
    return true;
}

} // namespace

int main(int argc, char **argv) {
    const int rounds = begin(argc, argv, 120);
    Limits limits = {60, 90, 400, 40, true, false};
    for (int round = 0; round < rounds; ++round) {
        Source source(uint64_t(round) + 300001);
        const Problem p = reference::random_problem(source, limits);
        if (!check_backward(source, p, "backward " + std::to_string(round) + " (" + describe(p) + ")")) return 1;
    }
    limits = {20, 40, 60, 512, true, false};
    for (int round = 0; round < rounds / 8; ++round) {
        Source source(uint64_t(round) + 400001);
        const Problem p = reference::random_problem(source, limits);
        if (!check_backward(source, p, "wide backward " + std::to_string(round) + " (" + describe(p) + ")")) return 1;
    }
    return end();
}
