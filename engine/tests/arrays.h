// Arrays of any shape and strides for the fused operations' C interface, and numbers that carry what rounding may do to
// them.
#pragma once

#include <numeric>

#include "heedful_ops/array.h"
#include "random_problem.h"

namespace reference {

typedef long double Wide;

// A number and how far arithmetic of unit roundoff u may be from it, in units of u: running error analysis, to first
// order (Wilkinson, "Error analysis revisited", 1986).
struct Running {
    Wide value, error;

    Running(Wide value = 0, Wide error = 0) : value(value), error(error) {}
};
inline Running operator+(Running a, Running b) {
    const Wide v = a.value + b.value;
    return {v, a.error + b.error + std::fabs(v)};
}
inline Running operator-(Running a) { return {-a.value, a.error}; }
inline Running operator-(Running a, Running b) { return a + -b; }
inline Running operator*(Running a, Running b) {
    const Wide v = a.value * b.value;
    return {v, std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + std::fabs(v)};
}
inline Running operator/(Running a, Running b) {
    const Wide v = a.value / b.value;
    return {v, (a.error + std::fabs(v) * b.error) / std::fabs(b.value) + std::fabs(v)};
}
// f(a), given f'(a), by a function that errs by `own` roundoffs.
inline Running through(Running a, Wide value, Wide slope, Wide own = 2) {
    return {value, std::fabs(slope) * a.error + own * std::fabs(value)};
}
inline Running exp(Running a) { return through(a, std::exp(a.value), std::exp(a.value)); }
inline Running log(Running a) { return through(a, std::log(a.value), 1 / a.value); }
inline Running sqrt(Running a) { return through(a, std::sqrt(a.value), 0.5L / std::sqrt(a.value)); }
inline Running tanh(Running a) {
    const Wide t = std::tanh(a.value);
    return through(a, t, (1 - t) * (1 + t), 4);
}
// Neither is a difference from 1 that loses digits.
inline Running sigmoid(Running a) {
    const Wide s = 1 / (1 + std::exp(-a.value)), rest = 1 / (1 + std::exp(a.value));
    return through(a, s, s * rest, 4);
}
inline Running normal_below(Running a) {
    const Wide density = std::exp(-a.value * a.value / 2) * 0.398942280401432677939946L;
    return through(a, std::erfc(-a.value * 0.707106781186547524400844L) / 2, density, 16 + a.value * a.value);
}
inline Running normal_density(Running a) {
    const Wide density = std::exp(-a.value * a.value / 2) * 0.398942280401432677939946L;
    return through(a, density, a.value * density, 8 + a.value * a.value);
}

typedef std::vector<int64_t> Sizes;

inline int32_t computed_dtype(int32_t dtype) { return dtype == HEEDFUL_FLOAT64 ? dtype : int32_t(HEEDFUL_FLOAT32); }

// body(index) for every index of a shape.
template <class Body> void for_each_index(const Sizes &size, Body body) {
    Sizes index(size.size(), 0);
    for (const int64_t n : size)
        if (n == 0) return;
    for (;;) {
        body(const_cast<const Sizes &>(index));
        size_t dim = size.size();
        while (dim > 0 && ++index[dim - 1] == size[dim - 1]) index[--dim] = 0;
        if (dim == 0) return;
    }
}

// Owns exactly the memory that its elements span. Begins as NaN in every type.
struct Array {
    int32_t dtype = HEEDFUL_FLOAT32;
    Sizes size, stride;
    int64_t origin = 0; // of the first element, in elements
    std::vector<char> memory;
    bool given = false;

    Array() = default;
    Array(int32_t dtype, const Sizes &size) : Array(dtype, size, Tensor::contiguous(size)) {}
    Array(int32_t dtype, const Sizes &size, const Sizes &stride)
        : dtype(dtype), size(size), stride(stride), given(true) {
        int64_t low = 0, high = 0, count = 1;
        for (size_t dim = 0; dim < size.size(); ++dim) {
            const int64_t reach = (size[dim] - 1) * stride[dim];
            (reach < 0 ? low : high) += reach;
            count *= size[dim];
        }
        origin = -low;
        memory.assign(size_t(count ? (high - low + 1) * bytes() : 0), char(0xff));
    }

    int64_t bytes() const { return BYTES[dtype]; }
    heedful_array seen() const {
        static char nothing; // an array without elements is still there
        char *const data = const_cast<char *>(memory.data());
        return {!given           ? nullptr
                : memory.empty() ? &nothing
                                 : data + origin * bytes(),
                dtype, int32_t(size.size()), size.data(), stride.data()};
    }
    // The last dimensions of the index count, and a size of 1 answers for every index.
    int64_t offset(const Sizes &index) const {
        int64_t at = origin;
        const size_t missing = index.size() - size.size();
        for (size_t dim = 0; dim < size.size(); ++dim) at += size[dim] == 1 ? 0 : index[missing + dim] * stride[dim];
        return at * bytes();
    }
    double get(const Sizes &index) const { return decode(dtype, memory.data() + offset(index)); }
    Wide operator[](const Sizes &index) const { return get(index); }
    void set(const Sizes &index, double x) {
        if (dtype == HEEDFUL_INT64) {
            const int64_t whole = int64_t(x);
            std::memcpy(memory.data() + offset(index), &whole, 8);
        } else {
            encode(dtype, memory.data() + offset(index), x);
        }
    }
    template <class Value> Array &fill(Value value) {
        for_each_index(size, [&](const Sizes &index) { set(index, value()); });
        return *this;
    }
};

// Dimensions in any order in memory, with gaps, backwards, and where elements may repeat without a step.
inline Array any_layout(Source &source, int32_t dtype, const Sizes &size, bool may_repeat = true) {
    const size_t ndim = size.size();
    std::vector<size_t> order(ndim);
    std::iota(order.begin(), order.end(), size_t(0));
    if (source.once_in(2))
        for (size_t i = ndim; i-- > 1;) std::swap(order[i], order[size_t(source.pick(0, int64_t(i)))]);
    Sizes stride(ndim);
    int64_t next = source.once_in(4) ? 2 : 1;
    for (size_t place = ndim; place-- > 0;) {
        const size_t dim = order[place];
        stride[dim] = source.once_in(8) ? -next : next;
        next *= std::max<int64_t>(size[dim], 1);
        if (source.once_in(4)) next += source.pick(1, 3);
        if (may_repeat && source.once_in(8)) stride[dim] = 0;
    }
    return Array(dtype, size, stride);
}

inline Array random_array(Source &source, int32_t dtype, const Sizes &size, double scale, bool may_repeat = true) {
    return any_layout(source, dtype, size, may_repeat).fill([&] { return scale * source.normal(); });
}

} // namespace reference
