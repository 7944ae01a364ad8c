// x * sigmoid(beta * x) and its gradients through the C interface against the formula in double: every dtype,
// dimensions in any order and with gaps, one beta and many, any number of threads.

#include <cmath>

#include "checks.h"
#include "heedful_ops/parametric_swish.h"

namespace {

constexpr double ROUNDOFF[] = {0x1p-24, 0x1p-9, 0x1p-12, 0x1p-53};

heedful_array array(const Tensor &tensor) {
    return {const_cast<char *>(tensor.memory.data()), tensor.view.dtype, tensor.view.ndim, tensor.view.size,
            tensor.view.stride};
}

// Of this size, its dimensions in any order in memory, now and then with gaps between elements.
Tensor any_layout(Source &source, int32_t dtype, const std::vector<int64_t> &size) {
    std::vector<size_t> order = {0, 1, 2};
    for (size_t i = 2; i > 0; --i) std::swap(order[i], order[size_t(source.pick(0, int64_t(i)))]);
    std::vector<int64_t> stride(3);
    int64_t next = source.pick(0, 3) ? 1 : 2;
    for (const size_t dim : order) {
        stride[dim] = next;
        next *= size[dim];
        next += source.pick(0, 3) ? 0 : 1;
    }
    return Tensor(dtype, size, stride);
}

void fill(Source &source, Tensor &tensor, double scale) {
    tensor.each([&](int64_t a, int64_t b, int64_t c, int64_t) {
        tensor.set(scale * double(source.pick(-1000, 1000)) / 1000, a, b, c);
    });
}

bool near(double found, double wanted, double size, int32_t dtype, const std::string &what) {
    const double computed = dtype == HEEDFUL_FLOAT64 ? 0x1p-53 : 0x1p-24;
    const double least = dtype == HEEDFUL_FLOAT16 ? 0x1p-24 : 0x1p-126;
    EXPECT(std::fabs(found - wanted) <= 8 * (ROUNDOFF[dtype] * std::fabs(wanted) + computed * size + least),
           what + " is " + std::to_string(found) + ", not " + std::to_string(wanted));
    return true;
}

bool check(Source &source, int32_t dtype, int64_t threads) {
    const std::vector<int64_t> size = {source.pick(1, 9), source.pick(1, 70), source.pick(1, 90)};
    Tensor x = any_layout(source, dtype, size), grad_out = any_layout(source, dtype, size);
    Tensor out = any_layout(source, dtype, size), grad_x = any_layout(source, dtype, size);
    fill(source, x, 6);
    fill(source, grad_out, 1);
    const int32_t dim = int32_t(source.pick(0, 2)), wide = dtype == HEEDFUL_FLOAT64 ? dtype : HEEDFUL_FLOAT32;
    const bool many = source.pick(0, 1);
    const int64_t count = many ? size[size_t(dim)] : 1;
    Tensor betas(wide, {count}), grad_betas(wide, {count});
    fill(source, betas, 2);
    const double beta = betas.get(0);
    const heedful_array x_array = array(x), grad_array = array(grad_out), out_array = array(out),
                        betas_array = array(betas), grad_x_array = array(grad_x), grad_betas_array = array(grad_betas);
    heedful_threads storage;
    const heedful_threads *const shared = threads_of(threads, storage);
    EXPECT(heedful_parametric_swish(&x_array, many ? &betas_array : nullptr, beta, dim, &out_array, shared) ==
                   HEEDFUL_OK &&
               heedful_parametric_swish_backward(&grad_array, &x_array, many ? &betas_array : nullptr, beta, dim,
                                                 &grad_x_array, &grad_betas_array, shared) == HEEDFUL_OK,
           heedful_error_message());
    std::vector<double> sums(size_t(count), 0.0), sizes(size_t(count), 0.0);
    bool good = true;
    x.each([&](int64_t a, int64_t b, int64_t c, int64_t) {
        const int64_t index[] = {a, b, c}, which = many ? index[dim] : 0;
        const double v = x.get(a, b, c), g = grad_out.get(a, b, c), t = betas.get(which) * v;
        const double s = 1 / (1 + std::exp(-t)), rest = 1 / (1 + std::exp(t)), grown = 6 + 2 * std::fabs(t);
        const std::string where = at({a, b, c}) + " of dtype " + std::to_string(dtype);
        const double share = g * v * v * s * rest;
        sums[size_t(which)] += share;
        sizes[size_t(which)] += std::fabs(share) * grown;
        good = good && near(out.get(a, b, c), v * s, std::fabs(v) * s * grown, dtype, "out" + where) &&
               near(grad_x.get(a, b, c), g * (s + t * s * rest), std::fabs(g) * (s + std::fabs(t) * s * rest) * grown,
                    dtype, "grad_x" + where);
    });
    for (int64_t i = 0; good && i < count; ++i)
        good = near(grad_betas.get(i), sums[size_t(i)], sizes[size_t(i)], wide, "grad_betas" + at({i}));
    return good;
}

bool check_refusals() {
    Tensor x(HEEDFUL_FLOAT32, {3, 5}), small(HEEDFUL_FLOAT32, {3, 4}), half(HEEDFUL_FLOAT16, {3, 5});
    const heedful_array x_array = array(x), small_array = array(small), half_array = array(half);
    const auto refused = [&](const heedful_array &out, int32_t dim, const char *name) {
        return heedful_parametric_swish(&x_array, nullptr, 1, dim, &out, nullptr) == HEEDFUL_INVALID_ARGUMENT &&
               std::string(heedful_error_message()).find(name) == 0;
    };
    EXPECT(refused(small_array, 0, "out") && refused(half_array, 0, "out"), "an output that is not as x is taken");
    EXPECT(refused(x_array, 2, "dim") && refused(x_array, -1, "dim"), "a dimension that x has not is taken");
    return true;
}

} // namespace

int main(int argc, char **argv) {
    const int rounds = begin(argc, argv, 200);
    if (!check_refusals()) return 1;
    for (int round = 0; round < rounds; ++round) {
        Source source(uint64_t(round) + 700001);
        if (!check(source, round % 4, round % 3 + 1)) return 1;
    }
    return end();
}
