// The weights of a call, dense and as lists of pairs, against plain loops in double.

#include "checks.h"

namespace {

struct Call {
    heedful_weights arguments = {};

    Call(const Problem &p, const Tensor &lse) {
        arguments.query = p.query.seen();
        arguments.key = p.key.seen();
        arguments.lse = lse.seen();
        arguments.scale = p.scale;
        arguments.schedule = p.schedule();
        arguments.features = p.features();
    }
    bool run(int64_t threads) const {
        heedful_threads storage;
        return heedful_attention_weights(&arguments, threads_of(threads, storage)) == HEEDFUL_OK;
    }
};

int64_t integer(const Tensor &tensor, size_t index) {
    int64_t x;
    std::memcpy(&x, tensor.memory.data() + index * 8, 8);
    return x;
}

bool check_dense(Source &source, const Problem &p, const Tensor &lse, const std::string &what) {
    Tensor weights = reference::strided(source, p.dtype, {p.batch, p.heads, p.q_length, p.k_length});
    Call call(p, lse);
    call.arguments.weights = weights.seen();
    EXPECT(call.run(1), what + ": " + heedful_error_message());
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < p.heads; ++h)
            for (int64_t i = 0; i < p.q_length; ++i) {
                const Row row(p, b, h, i);
                for (int64_t j = 0; j < p.k_length; ++j) {
                    const double found = weights.get(b, h, i, j);
                    const std::string place = what + ": weights" + at({b, h, i, j});
                    EXPECT(row.counts[size_t(j)] || found == 0, place + " does not count and is not 0");
                    EXPECT_BOUNDED(found, reference::weight(p, row, j), place);
                }
            }
    const std::vector<char> first = weights.memory;
    EXPECT(call.run(3) && weights.memory == first, what + ": 3 threads give other bits than one");
    return true;
}

bool check_sparse(const Problem &p, const Tensor &lse, const std::string &what) {
    Tensor counts(HEEDFUL_INT64, {p.batch, p.heads, p.q_length}), begin = counts;
    Call counting(p, lse);
    counting.arguments.counts = counts.seen();
    EXPECT(counting.run(2), what + ": " + heedful_error_message());
    int64_t total = 0;
    for (size_t row = 0; row < begin.memory.size() / 8; ++row) {
        std::memcpy(begin.memory.data() + row * 8, &total, 8);
        total += integer(counts, row);
    }
    Tensor values(p.dtype, {total}), indices(HEEDFUL_INT64, {4, total});
    Call listing(p, lse);
    listing.arguments.values = values.seen();
    listing.arguments.indices = indices.seen();
    listing.arguments.row_begin = begin.seen();
    EXPECT(listing.run(1), what + ": " + heedful_error_message());
    size_t entry = 0;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < p.heads; ++h)
            for (int64_t i = 0; i < p.q_length; ++i) {
                const Row row(p, b, h, i);
                for (int64_t j = 0; j < p.k_length; ++j) {
                    if (!row.counts[size_t(j)]) continue;
                    const std::string place = what + ": pair" + at({b, h, i, j});
                    EXPECT(int64_t(entry) < total, place + " is not listed");
                    const int64_t wanted[] = {b, h, i, j};
                    for (size_t axis = 0; axis < 4; ++axis)
                        EXPECT(integer(indices, axis * size_t(total) + entry) == wanted[axis], place + " is missing");
                    EXPECT_BOUNDED(values.get(int64_t(entry)), reference::weight(p, row, j), place);
                    ++entry;
                }
            }
    EXPECT(int64_t(entry) == total, what + ": pairs are listed that do not count");
    const std::vector<char> first_values = values.memory, first_indices = indices.memory;
    EXPECT(listing.run(4) && values.memory == first_values && indices.memory == first_indices,
           what + ": 4 threads give other bits than one");
    return true;
}

} // namespace

int main(int argc, char **argv) {
    const int rounds = begin(argc, argv, 100);
    for (int round = 0; round < rounds; ++round) {
        Source source(uint64_t(round) + 500001);
        const Problem p = reference::random_problem(source, {60, 90, 600, 40, true, false});
        const std::string what = "weights " + std::to_string(round) + " (" + describe(p) + ")";
        const Forward forward(p, 1);
        if (forward.status != HEEDFUL_OK) return !fail(what + ": forward: " + forward.message);
        if (!check_dense(source, p, forward.lse, what) || !check_sparse(p, forward.lse, what)) return 1;
    }
    return end();
}
