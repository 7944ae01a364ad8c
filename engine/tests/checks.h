// What the tests share: expectations that say where they failed, and the calls with outputs that begin as NaN.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "random_problem.h"

using reference::Limits;
using reference::NONE;
using reference::Problem;
using reference::Row;
using reference::Source;
using reference::Tensor;
using reference::Terms;

#define EXPECT(condition, text)                                                                                        \
    do {                                                                                                               \
        if (!(condition)) return fail(text);                                                                           \
    } while (0)
#define EXPECT_BOUNDED(found, expected, text)                                                                          \
    do {                                                                                                               \
        const double expect_found = (found);                                                                           \
        const reference::Bounded expect_bounded = (expected);                                                          \
        if (!expect_bounded.holds(expect_found)) return fail_bounded(expect_found, expect_bounded, text);              \
    } while (0)

inline bool fail(const std::string &text) {
    std::printf("%s\n", text.c_str());
    return false;
}

inline bool fail_bounded(double found, const reference::Bounded &expected, const std::string &text) {
    std::printf("%s is %.9g, not %.9g within %.3g\n", text.c_str(), found, expected.wanted, expected.bound);
    return false;
}

inline std::string at(const std::vector<int64_t> &index) {
    std::string text;
    for (int64_t i : index) text += (text.empty() ? "[" : ", ") + std::to_string(i);
    return text + "]";
}

inline std::string describe(const Problem &p) {
    const char *const names[] = {"fp32", "bf16", "fp16", "fp64"};
    std::string text = std::string(names[p.dtype]) + " B " + std::to_string(p.batch) + " H " + std::to_string(p.heads) +
                       "/" + std::to_string(p.kv_heads) + " L " + std::to_string(p.q_length) + ", " +
                       std::to_string(p.k_length) + " D " + std::to_string(p.dim) + ", " + std::to_string(p.value_dim);
    const struct {
        bool given;
        const char *name;
    } features[] = {{p.page > 0, "paged"},
                    {p.softcap > 0, "softcap"},
                    {p.bias.given(), "bias"},
                    {p.slopes.given(), "alibi"},
                    {p.sinks.given(), "sinks"},
                    {p.dropout_p > 0, "dropout"},
                    {p.query_offset.given(), "offset"}};
    for (const auto &feature : features)
        if (feature.given) text += std::string(" ") + feature.name;
    text += " code";
    for (int64_t number : p.code) text += " " + std::to_string(number);
    return text;
}

// The number of rounds, from the command line or the default. CTest asks for a tier through HEEDFUL_ISA: where this
// processor lacks it, the test is skipped (status 77).
inline int begin(int argc, char **argv, int rounds) {
    const char *const wanted = std::getenv("HEEDFUL_ISA");
    const char *const selected = heedful_isa_name(heedful_isa_selected());
    if (wanted && *wanted && std::string(wanted) != selected) {
        std::printf("this processor does not run %s\n", wanted);
        std::exit(77);
    }
    return argc > 1 ? std::atoi(argv[1]) : rounds;
}

inline int end() {
    std::printf("all agree on %s\n", heedful_isa_name(heedful_isa_selected()));
    return 0;
}

inline const heedful_threads *threads_of(int64_t count, heedful_threads &storage) {
    storage = {count, reference::run_on_threads, nullptr};
    return count > 1 ? &storage : nullptr;
}

struct Forward {
    Tensor out, lse;
    heedful_status status;
    std::string message;

    Forward(const Problem &p, int64_t threads)
        : Forward(p, heedful_threads{threads, reference::run_on_threads, nullptr}) {}

    Forward(const Problem &p, const heedful_threads &threads)
        : out(p.dtype, {p.batch, p.heads, p.q_length, p.value_dim}),
          lse(p.sum_dtype(), {p.batch, p.heads, p.q_length}) {
        const heedful_forward call = {p.query.seen(), p.key.seen(), p.value.seen(), out.seen(),    lse.seen(),
                                      p.scale,        p.schedule(), p.features(),   p.pages.seen()};
        status = heedful_attention_forward(&call, threads.count > 1 ? &threads : nullptr);
        if (status != HEEDFUL_OK) message = heedful_error_message();
    }
};
