// The forward call against plain loops in double: random shapes, strides, types, schedules, features and pages; one
// query or a few against long caches; and the same bits for any number of threads.

#include "checks.h"

namespace {

bool check_forward(const Problem &p, int64_t threads, const std::string &what) {
    const Forward first(p, 1);
    EXPECT(first.status == HEEDFUL_OK, what + ": " + first.message);
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < p.heads; ++h)
            for (int64_t i = 0; i < p.q_length; ++i) {
                const Row row(p, b, h, i);
                for (int64_t d = 0; d < p.value_dim; ++d)
                    EXPECT_BOUNDED(first.out.get(b, h, i, d), reference::output(p, row, b, h, d),
                                   what + ": out" + at({b, h, i, d}));
                EXPECT_BOUNDED(first.lse.get(b, h, i), reference::lse(p, row), what + ": lse" + at({b, h, i}));
            }
    const Forward again(p, threads);
    EXPECT(again.status == HEEDFUL_OK, what + ": " + again.message);
    EXPECT(again.out.memory == first.out.memory && again.lse.memory == first.lse.memory,
           what + ": " + std::to_string(threads) + " threads give other bits than one");
    return true;
}

bool check_strided_output(Source &source, const Problem &p, const std::string &what) {
    const Forward plain(p, 1);
    Tensor out = reference::strided(source, p.dtype, {p.batch, p.heads, p.q_length, p.value_dim});
    const std::vector<char> untouched = out.memory;
    const heedful_forward call = {p.query.seen(), p.key.seen(), p.value.seen(), out.seen(),    {},
                                  p.scale,        p.schedule(), p.features(),   p.pages.seen()};
    EXPECT(heedful_attention_forward(&call, nullptr) == HEEDFUL_OK, what + ": " + heedful_error_message());
    Tensor rest = out;
    bool same = true;
    out.each([&](int64_t b, int64_t h, int64_t i, int64_t d) {
        same = same &&
               !std::memcmp(out.memory.data() + out.offset(b, h, i, d),
                            plain.out.memory.data() + plain.out.offset(b, h, i, d), size_t(reference::BYTES[p.dtype]));
        std::fill_n(rest.memory.begin() + rest.offset(b, h, i, d), reference::BYTES[p.dtype], char(0xff));
    });
    EXPECT(same, what + ": a strided output differs");
    EXPECT(rest.memory == untouched, what + ": the gaps of a strided output were written");
    return true;
}

// Few queries against a long cache, several query heads to a key head, with lengths of their own.
Problem decoding(Source &source, const Limits &limits) {
    Problem p;
    p.dtype = int32_t(source.pick(HEEDFUL_FLOAT32, HEEDFUL_FLOAT64));
    p.batch = source.pick(1, 3);
    p.kv_heads = source.pick(1, 2);
    p.heads = p.kv_heads * source.pick(1, 8);
    p.q_length = source.once_in(2) ? 1 : source.pick(2, 16);
    p.k_length = source.pick(1, limits.long_k_length);
    p.dim = source.pick(1, limits.dim);
    p.value_dim = source.once_in(2) ? p.dim : source.pick(1, limits.dim);
    p.scale = 1 / std::sqrt(double(p.dim));
    if (source.once_in(2)) {
        p.page = source.once_in(2) ? 16 : source.pick(1, 70);
        p.k_length = (p.k_length + p.page - 1) / p.page * p.page;
    }
    if (source.once_in(2)) {
        // Each item's queries are the last of its own length.
        const int64_t slot = reference::add_per_item(source, p, 0, p.k_length);
        std::vector<Terms> atoms = {
            {{reference::BOUND, 2, 1, -p.q_length, slot, 1, NONE}, {reference::BOUND, 1, 1, -1, slot, 1, NONE}}};
        if (source.once_in(2)) atoms[0].push_back({reference::BOUND, 2, 0, -source.pick(1, 300), slot, 1, NONE});
        reference::set_code(p, atoms);
    } else {
        reference::set_code(p, {{{reference::BOUND, 2, 1, 0, reference::END, 1, NONE}}});
    }
    if (source.once_in(2)) reference::add_features(source, p);
    reference::add_inputs(source, p);
    return p;
}

} // namespace

int main(int argc, char **argv) {
    const int rounds = begin(argc, argv, 150);
    Limits limits;
    limits.pages = true;
    for (int round = 0; round < rounds; ++round) {
        Source source(uint64_t(round) + 1);
        const Problem p = reference::random_problem(source, limits);
        const std::string what = "call " + std::to_string(round) + " (" + describe(p) + ")";
        if (!check_forward(p, source.pick(2, 5), what) || !check_strided_output(source, p, what)) return 1;
    }
    limits.long_k_length = 1800;
    for (int round = 0; round < rounds / 4; ++round) {
        Source source(uint64_t(round) + 100001);
        const Problem p = decoding(source, limits);
        if (!check_forward(p, source.pick(2, 5), "decode " + std::to_string(round) + " (" + describe(p) + ")"))
            return 1;
    }
    limits = {5, 40, 60, 512, true, true};
    for (int round = 0; round < rounds / 8; ++round) {
        Source source(uint64_t(round) + 200001);
        const Problem p = reference::random_problem(source, limits);
        if (!check_forward(p, 2, "wide " + std::to_string(round) + " (" + describe(p) + ")")) return 1;
    }
    return end();
}
