// Cross entropy of rows of logits in one pass, and the gradient of the logits in one more.
#include "tiers.h"

#include "heedful_ops/cross_entropy.h"

namespace heedful {

// What is known of a row after some of its classes.
struct RowState {
    double most, sum; // the largest s, and the sum of e^(s - most)
    double at_target, total;
};

// The gradient of s is share * e^(s - lse) - even, and at the target - hit.
struct RowSlope {
    double lse, share, even, hit;
};

struct CrossEntropyKernels {
    // By heedful_dtype. target is an index among the n classes, or none.
    void (*add[4])(const void *logits, int64_t n, int64_t target, double softcap, RowState *state);
    void (*slope[4])(const void *logits, int64_t n, int64_t target, double softcap, const RowSlope &row, void *out);
};
HEEDFUL_KERNELS(CrossEntropyKernels, cross_entropy)

#if defined(HEEDFUL_TIER)

namespace {

template <class In> struct CrossEntropy {
    typedef typename ComputedIn<In>::type T;
    typedef typename Real<T>::V V;
    static constexpr int LANES = Real<T>::LANES;
    // Classes that are looked at twice, for their maximum and for their sum, while they are in the first cache.
    static constexpr int64_t PIECE = 1024;

    template <bool CAPPED> static INLINE V score(V x, T softcap) {
        if constexpr (CAPPED) return tanh<T>(x / softcap) * softcap;
        else return x;
    }

    static T largest(const T *s, int64_t n) {
        V most = Real<T>::set1(T(-__builtin_inf()));
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) most = Real<T>::max(most, Real<T>::load(s + i));
        T result = Real<T>::reduce_max(most);
        for (; i < n; ++i) result = s[i] > result ? s[i] : result;
        return result;
    }

    // Four sums, so that none waits for the one before, and each adds few numbers.
    static T sum_of_powers(const T *s, int64_t n, T most) {
        V sum[4] = {};
        const V shift = Real<T>::set1(most);
        int64_t i = 0;
        for (; i + 4 * LANES <= n; i += 4 * LANES)
            for (int j = 0; j < 4; ++j) sum[j] += exp<T>(Real<T>::load(s + i + j * LANES) - shift);
        for (; i + LANES <= n; i += LANES) sum[0] += exp<T>(Real<T>::load(s + i) - shift);
        if (i < n) {
            T rest[LANES];
            for (int lane = 0; lane < LANES; ++lane) rest[lane] = lane < n - i ? s[i + lane] : T(-__builtin_inf());
            sum[0] += exp<T>(Real<T>::load(rest) - shift);
        }
        return Real<T>::reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }

    static double total_of(const T *s, int64_t n) {
        V sum = {};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) sum += Real<T>::load(s + i);
        double total = double(Real<T>::reduce_add(sum));
        for (; i < n; ++i) total += double(s[i]);
        return total;
    }

    template <bool CAPPED> static void add_pieces(const In *x, int64_t n, int64_t target, T softcap, RowState &state) {
        alignas(64) T buffer[PIECE];
        for (int64_t begin = 0; begin < n; begin += PIECE) {
            const int64_t count = n - begin < PIECE ? n - begin : PIECE;
            const T *s;
            if constexpr (!CAPPED && sizeof(In) == sizeof(T)) {
                s = reinterpret_cast<const T *>(x + begin);
            } else {
                T *const to = buffer;
                const In *const from = x + begin;
                for_vectors<T>(count, [=](int64_t i, auto part) {
                    part.store(to + i, score<CAPPED>(part.load(from + i), softcap));
                });
                s = buffer;
            }
            if (target >= begin && target < begin + count) state.at_target = double(s[target - begin]);
            state.total += total_of(s, count);
            const double most = double(largest(s, count));
            if (most > state.most) {
                state.sum *= __builtin_exp(state.most - most);
                state.most = most;
            }
            // Where all were -inf there is nothing to add, unless one was NaN.
            if (state.most == -__builtin_inf()) state.sum += state.total != state.total ? state.total : 0.0;
            else state.sum += double(sum_of_powers(s, count, T(state.most)));
        }
    }
    static void add(const void *logits, int64_t n, int64_t target, double softcap, RowState *state) {
        const In *const x = static_cast<const In *>(logits);
        if (softcap > 0) add_pieces<true>(x, n, target, T(softcap), *state);
        else add_pieces<false>(x, n, target, T(softcap), *state);
    }

    template <bool CAPPED> static INLINE V slope_of(V x, T softcap, V lse, V share, V less) {
        const V s = score<CAPPED>(x, softcap);
        const V g = share * exp<T>(s - lse) - less;
        if constexpr (!CAPPED) return g;
        const V t = s / softcap;
        return g * ((T(1) - t) * (T(1) + t));
    }
    template <bool CAPPED>
    static void slopes(const In *x, int64_t n, int64_t target, T softcap, const RowSlope &row, In *out) {
        const V lse = Real<T>::set1(T(row.lse)), share = Real<T>::set1(T(row.share)), even = Real<T>::set1(T(row.even));
        In at_target = {};
        if (target >= 0 && target < n) {
            const V v = Real<T>::set1(widen1(x[target]));
            const V less = Real<T>::set1(T(row.even + row.hit));
            narrow1(&at_target, slope_of<CAPPED>(v, softcap, lse, share, less)[0]);
        }
        for_vectors<T>(n, [=](int64_t i, auto part) {
            part.store(out + i, slope_of<CAPPED>(part.load(x + i), softcap, lse, share, even));
        });
        if (target >= 0 && target < n) out[target] = at_target;
    }
    static void slope(const void *logits, int64_t n, int64_t target, double softcap, const RowSlope &row, void *out) {
        const In *const x = static_cast<const In *>(logits);
        if (row.share == 0 && row.even == 0 && row.hit == 0) __builtin_memset(out, 0, size_t(n) * sizeof(In));
        else if (softcap > 0) slopes<true>(x, n, target, T(softcap), row, static_cast<In *>(out));
        else slopes<false>(x, n, target, T(softcap), row, static_cast<In *>(out));
    }
};

} // namespace

const CrossEntropyKernels HEEDFUL_TIER::cross_entropy = {
    {CrossEntropy<float>::add, CrossEntropy<bfloat16>::add, CrossEntropy<float16>::add, CrossEntropy<double>::add},
    {CrossEntropy<float>::slope, CrossEntropy<bfloat16>::slope, CrossEntropy<float16>::slope,
     CrossEntropy<double>::slope},
};

#else

} // namespace heedful

#include <cmath>
#include <limits>

namespace heedful {
namespace {

typedef heedful_cross_entropy_terms Terms;

int64_t target_of(const heedful_array &targets, int64_t row) {
    return static_cast<const int64_t *>(targets.data)[row * targets.stride[0]];
}

void check_terms(const heedful_array &logits, const heedful_array &targets, const Terms &terms) {
    check_array("logits", logits);
    REQUIRE(logits.ndim == 2, "logits: has " + std::to_string(logits.ndim) + " dimensions, takes 2");
    REQUIRE(targets.dtype == HEEDFUL_INT64 && targets.ndim == 1 && targets.size[0] == logits.size[0],
            "targets: takes int64, one for each row of logits");
    REQUIRE(targets.data || logits.size[0] == 0, "targets: has no data");
    REQUIRE(terms.first >= 0 && terms.classes >= 1 && terms.first + logits.size[1] <= terms.classes,
            "first: is " + std::to_string(terms.first) + " of " + std::to_string(terms.classes) +
                " classes, with logits of " + std::to_string(logits.size[1]));
    REQUIRE(terms.smoothing >= 0 && terms.smoothing <= 1, "smoothing: takes 0 to 1");
    REQUIRE(terms.softcap >= 0, "softcap: takes a positive number, or 0 for none");
    if (terms.first == 0)
        for (int64_t row = 0; row < logits.size[0]; ++row) {
            const int64_t target = target_of(targets, row);
            REQUIRE(target == terms.ignore_index || (target >= 0 && target < terms.classes),
                    "target: has " + std::to_string(target) + ", takes 0 to " + std::to_string(terms.classes - 1) +
                        ", or ignore_index, " + std::to_string(terms.ignore_index));
        }
}

int64_t rows_of_item(const heedful_array &logits) {
    return std::max<int64_t>(1, ITEM_ELEMENTS / std::max<int64_t>(logits.size[1], 1));
}

template <class Word> void gather(char *to, const char *from, int64_t step, int64_t n) {
    for (int64_t i = 0; i < n; ++i) reinterpret_cast<Word *>(to)[i] = reinterpret_cast<const Word *>(from)[i * step];
}
template <class Word> void scatter(char *to, int64_t step, const char *from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) reinterpret_cast<Word *>(to)[i * step] = reinterpret_cast<const Word *>(from)[i];
}

// body(at, column, n) for a row's classes: all at once where they lie side by side, otherwise copies of some.
template <class Body> void for_pieces(const heedful_array &logits, int64_t row, Body body) {
    const int64_t bytes = element_bytes(logits.dtype), step = logits.stride[1], classes = logits.size[1];
    const char *const at = static_cast<const char *>(logits.data) + row * logits.stride[0] * bytes;
    if (step == 1 || classes == 1) return body(at, int64_t(0), classes);
    alignas(64) char copy[BUFFER_ELEMENTS * 8];
    for (int64_t column = 0; column < classes; column += BUFFER_ELEMENTS) {
        const int64_t n = std::min(BUFFER_ELEMENTS, classes - column);
        const char *const from = at + column * step * bytes;
        if (bytes == 2) gather<uint16_t>(copy, from, step, n);
        else if (bytes == 4) gather<uint32_t>(copy, from, step, n);
        else gather<uint64_t>(copy, from, step, n);
        body(static_cast<const char *>(copy), column, n);
    }
}

double number_at(const heedful_array &array, int64_t row) {
    const int64_t at = row * array.stride[0];
    return array.dtype == HEEDFUL_FLOAT64 ? static_cast<const double *>(array.data)[at]
                                          : double(static_cast<const float *>(array.data)[at]);
}
void put(const heedful_array &array, int64_t row, double value) {
    if (array.dtype == HEEDFUL_FLOAT64) static_cast<double *>(array.data)[row] = value;
    else static_cast<float *>(array.data)[row] = float(value);
}

void forward_rows(const heedful_array &logits, const heedful_array &targets, const Terms &terms,
                  const heedful_array *statistics, const heedful_array &losses, const heedful_array &lse,
                  const heedful_threads *threads) {
    check_terms(logits, targets, terms);
    const int64_t rows = logits.size[0], classes = logits.size[1];
    const bool begins = terms.first == 0, ends = terms.first + classes == terms.classes;
    const bool kept = statistics && statistics->data;
    REQUIRE(kept || (begins && ends) || rows == 0, "statistics: there are none, and the call does not see all classes");
    if (kept) check_result("statistics", *statistics, rows * 4, HEEDFUL_FLOAT64);
    if (ends) {
        check_result("losses", losses, rows, computed_dtype(logits.dtype));
        check_result("lse", lse, rows, computed_dtype(logits.dtype));
    }
    const auto kernel = in_use_cross_entropy().add[logits.dtype];
    const int64_t item_rows = rows_of_item(logits);
    share_out(threads, (rows + item_rows - 1) / item_rows, [&](auto claim) {
        for (int64_t item = claim(); item >= 0; item = claim()) {
            for (int64_t row = item * item_rows; row < std::min((item + 1) * item_rows, rows); ++row) {
                RowState state = {-std::numeric_limits<double>::infinity(), 0, 0, 0};
                RowState *const stored = kept ? static_cast<RowState *>(statistics->data) + row : nullptr;
                if (!begins) state = *stored;
                const int64_t target = target_of(targets, row);
                for_pieces(logits, row, [&](const char *at, int64_t column, int64_t n) {
                    kernel(at, n, target - terms.first - column, terms.softcap, &state);
                });
                if (stored) *stored = state;
                if (!ends) continue;
                const double sum = state.most + std::log(state.sum);
                put(lse, row, sum);
                const double loss = sum - (terms.smoothing < 1 ? (1 - terms.smoothing) * state.at_target : 0) -
                                    (terms.smoothing > 0 ? terms.smoothing * state.total / double(terms.classes) : 0);
                put(losses, row, target == terms.ignore_index ? 0 : loss);
            }
        }
    });
}

void backward_rows(const heedful_array &grad_losses, const heedful_array *grad_lse, const heedful_array &logits,
                   const heedful_array &targets, const Terms &terms, const heedful_array &lse,
                   const heedful_array &grad_logits, const heedful_threads *threads) {
    check_terms(logits, targets, terms);
    check_like("grad_logits", grad_logits, "logits", logits);
    const auto check_row_numbers = [&](const char *name, const heedful_array &numbers) {
        REQUIRE(numbers.dtype == computed_dtype(logits.dtype) && numbers.ndim == 1 && numbers.size[0] == logits.size[0],
                std::string(name) + ": takes one number for each row, in the type that is computed in");
        REQUIRE(numbers.data || logits.size[0] == 0, std::string(name) + ": has no data");
    };
    check_row_numbers("grad_losses", grad_losses);
    check_row_numbers("lse", lse);
    const bool of_lse = grad_lse && grad_lse->data;
    if (of_lse) check_row_numbers("grad_lse", *grad_lse);
    const auto kernel = in_use_cross_entropy().slope[logits.dtype];
    const int64_t rows = logits.size[0], bytes = element_bytes(logits.dtype), item_rows = rows_of_item(logits);
    const int64_t step = grad_logits.stride[1];
    const bool direct = step == 1 || logits.size[1] == 1;
    share_out(threads, (rows + item_rows - 1) / item_rows, [&](auto claim) {
        for (int64_t item = claim(); item >= 0; item = claim()) {
            for (int64_t row = item * item_rows; row < std::min((item + 1) * item_rows, rows); ++row) {
                const int64_t target = target_of(targets, row);
                const double loss_slope = target == terms.ignore_index ? 0 : number_at(grad_losses, row);
                const RowSlope slope = {number_at(lse, row), loss_slope + (of_lse ? number_at(*grad_lse, row) : 0),
                                        loss_slope * terms.smoothing / double(terms.classes),
                                        loss_slope * (1 - terms.smoothing)};
                char *const to = static_cast<char *>(grad_logits.data) + row * grad_logits.stride[0] * bytes;
                for_pieces(logits, row, [&](const char *at, int64_t column, int64_t n) {
                    const int64_t among = target - terms.first - column;
                    if (direct) return kernel(at, n, among, terms.softcap, slope, to + column * bytes);
                    alignas(64) char some[BUFFER_ELEMENTS * 8];
                    for (int64_t begin = 0; begin < n; begin += BUFFER_ELEMENTS) {
                        const int64_t count = std::min(BUFFER_ELEMENTS, n - begin);
                        kernel(at + begin * bytes, count, among - begin, terms.softcap, slope, some);
                        char *const target_at = to + (column + begin) * step * bytes;
                        if (bytes == 2) scatter<uint16_t>(target_at, step, some, count);
                        else if (bytes == 4) scatter<uint32_t>(target_at, step, some, count);
                        else scatter<uint64_t>(target_at, step, some, count);
                    }
                });
            }
        }
    });
}

} // namespace

#endif

} // namespace heedful

#if !defined(HEEDFUL_TIER)

extern "C" heedful_status heedful_cross_entropy(const heedful_array *logits, const heedful_array *targets,
                                                const heedful_cross_entropy_terms *terms,
                                                const heedful_array *statistics, const heedful_array *losses,
                                                const heedful_array *lse, const heedful_threads *threads) {
    return heedful::guarded(
        [&] { heedful::forward_rows(*logits, *targets, *terms, statistics, *losses, *lse, threads); });
}

extern "C" heedful_status heedful_cross_entropy_backward(const heedful_array *grad_losses,
                                                         const heedful_array *grad_lse, const heedful_array *logits,
                                                         const heedful_array *targets,
                                                         const heedful_cross_entropy_terms *terms,
                                                         const heedful_array *lse, const heedful_array *grad_logits,
                                                         const heedful_threads *threads) {
    return heedful::guarded([&] {
        heedful::backward_rows(*grad_losses, grad_lse, *logits, *targets, *terms, *lse, *grad_logits, threads);
    });
}

#endif
