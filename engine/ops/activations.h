// Activations and their slopes on vectors. Included by an operation's source after tiers.h, in its tiers' part.
#pragma once

namespace heedful {
namespace {

// Activations know the type that their argument comes from and their result is rounded to.
template <class T> struct WithSlope {
    typename Real<T>::V value, slope;
};

struct Silu {
    template <class T, class In = T> static INLINE typename Real<T>::V value(typename Real<T>::V x) {
        return quotient_for<In>(x, T(1) + exp_for<In>(-x));
    }
    template <class T, class In = T> static INLINE WithSlope<T> with_slope(typename Real<T>::V x) {
        const typename Real<T>::V s = sigmoid_for<In>(x);
        return {x * s, s * (T(1) + x * (T(1) - s))};
    }
};

struct Gelu {
    template <class T, class In = T> static INLINE typename Real<T>::V value(typename Real<T>::V x) {
        return x * normal_parts<In>(x).below;
    }
    template <class T, class In = T> static INLINE WithSlope<T> with_slope(typename Real<T>::V x) {
        const NormalParts<T> normal = normal_parts<In>(x);
        return {x * normal.below, normal.below + x * normal.density};
    }
};

// (1 + tanh(t)) / 2 is the sigmoid of 2 t.
struct GeluTanh {
    static constexpr double RATE = 1.59576912160573071175978; // 2 sqrt(2 / pi)
    static constexpr double CUBE = 0.044715;
    template <class T, class In = T> static INLINE typename Real<T>::V value(typename Real<T>::V x) {
        return quotient_for<In>(x, T(1) + exp_for<In>(-(x * (T(RATE) + T(RATE * CUBE) * (x * x)))));
    }
    template <class T, class In = T> static INLINE WithSlope<T> with_slope(typename Real<T>::V x) {
        typedef typename Real<T>::V V;
        // Beyond, the sigmoid is 0 or 1, and squares would be out of range.
        const V limit = Real<T>::set1(100), y = clamp<T>(x, -limit, limit), square = y * y;
        const V s = sigmoid_for<In>(y * (T(RATE) + T(RATE * CUBE) * square));
        return {x * s, s * (T(1) + y * (T(RATE) + T(3 * RATE * CUBE) * square) * (T(1) - s))};
    }
};

} // namespace
} // namespace heedful
