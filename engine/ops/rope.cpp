// Pairs of elements turned by angles whose cosines and sines are given; the gradient is the same with the angles
// negated.
#include "tiers.h"

#include "heedful_ops/rope.h"

namespace heedful {

// Rows whose elements lie side by side, at equal distances in bytes.
struct RopeRows {
    const char *x, *cos, *sin;
    char *out;
    int64_t x_step, cos_step, sin_step, out_step;
    int64_t rows, half, size; // half: pairs of a row; size: elements of a row
    double sign;              // of the sines
};

struct RopeKernels {
    // By whether pairs are neighbours, whether cos and sin are in the type that is computed in (otherwise in x's), and
    // heedful_dtype.
    void (*turn[2][2][4])(const RopeRows &rows);
};
HEEDFUL_KERNELS(RopeKernels, rope)

#if defined(HEEDFUL_TIER)

namespace {

template <class In, class Table> struct Turn {
    typedef typename ComputedIn<In>::type T;
    typedef typename Real<T>::V V;
    static constexpr int LANES = Real<T>::LANES;

    static INLINE void halves(const In *x, const Table *cos, const Table *sin, In *out, int64_t half, T sign) {
        for_vectors<T>(half, [=](int64_t i, auto part) {
            const V a = part.load(x + i), b = part.load(x + half + i), c = part.load(cos + i),
                    s = part.load(sin + i) * sign;
            part.store(out + i, a * c - b * s);
            part.store(out + half + i, b * c + a * s);
        });
    }

    // Two vectors of neighbours, of which c and s has one element for each pair.
    template <int... I> static INLINE void turn_pairs(V &low, V &high, V c, V s, Lanes<I...>) {
        const V signs = {T(I & 1 ? 1 : -1)...};
        const V c_low = __builtin_shufflevector(c, c, (I / 2)...),
                c_high = __builtin_shufflevector(c, c, (LANES / 2 + I / 2)...);
        const V s_low = __builtin_shufflevector(s, s, (I / 2)...) * signs,
                s_high = __builtin_shufflevector(s, s, (LANES / 2 + I / 2)...) * signs;
        low = low * c_low + __builtin_shufflevector(low, low, (I ^ 1)...) * s_low;
        high = high * c_high + __builtin_shufflevector(high, high, (I ^ 1)...) * s_high;
    }
    static INLINE void neighbours(const In *x, const Table *cos, const Table *sin, In *out, int64_t half, T sign) {
        int64_t i = 0;
        for (; i + LANES <= half; i += LANES) {
            V low = widen(x + 2 * i), high = widen(x + 2 * i + LANES);
            turn_pairs(low, high, widen(cos + i), widen(sin + i) * sign, typename MakeLanes<LANES>::type());
            narrow(out + 2 * i, low);
            narrow(out + 2 * i + LANES, high);
        }
        for (; i < half; ++i) {
            const T a = widen1(x[2 * i]), b = widen1(x[2 * i + 1]), c = widen1(cos[i]), s = widen1(sin[i]) * sign;
            narrow1(out + 2 * i, a * c - b * s);
            narrow1(out + 2 * i + 1, b * c + a * s);
        }
    }

    template <bool NEIGHBOURS> static void rows(const RopeRows &r) {
        const int64_t rest = (r.size - 2 * r.half) * int64_t(sizeof(In));
        for (int64_t row = 0; row < r.rows; ++row) {
            const In *const x = reinterpret_cast<const In *>(r.x + row * r.x_step);
            const Table *const cos = reinterpret_cast<const Table *>(r.cos + row * r.cos_step),
                               *const sin = reinterpret_cast<const Table *>(r.sin + row * r.sin_step);
            In *const out = reinterpret_cast<In *>(r.out + row * r.out_step);
            if constexpr (NEIGHBOURS) neighbours(x, cos, sin, out, r.half, T(r.sign));
            else halves(x, cos, sin, out, r.half, T(r.sign));
            if (rest > 0 && x != out) __builtin_memcpy(out + 2 * r.half, x + 2 * r.half, size_t(rest));
        }
    }
};

} // namespace

#define FOR_TYPES(neighbours)                                                                                          \
    {                                                                                                                  \
        {Turn<float, float>::rows<neighbours>, Turn<bfloat16, bfloat16>::rows<neighbours>,                             \
         Turn<float16, float16>::rows<neighbours>, Turn<double, double>::rows<neighbours>},                            \
        {                                                                                                              \
            Turn<float, float>::rows<neighbours>, Turn<bfloat16, float>::rows<neighbours>,                             \
                Turn<float16, float>::rows<neighbours>, Turn<double, double>::rows<neighbours>                         \
        }                                                                                                              \
    }
const RopeKernels HEEDFUL_TIER::rope = {{FOR_TYPES(false), FOR_TYPES(true)}};
#undef FOR_TYPES

#else

namespace {

// Strides in bytes of an array along x's leading dimensions, to which it broadcasts with its own leading ones.
void broadcast(const char *name, const heedful_array &array, int32_t own_dims, const heedful_array &x,
               int64_t (&strides)[MAX_DIMS]) {
    const int32_t rows_dims = x.ndim - 1;
    std::fill_n(strides, MAX_DIMS, 0);
    REQUIRE(own_dims <= rows_dims, std::string(name) + ": has more dimensions than x");
    for (int32_t dim = 0; dim < own_dims; ++dim) {
        const int32_t of_x = rows_dims - own_dims + dim;
        REQUIRE(array.size[dim] == 1 || array.size[dim] == x.size[of_x],
                std::string(name) + ": does not broadcast to x's leading sizes");
        if (array.size[dim] != 1) strides[of_x] = array.stride[dim] * element_bytes(array.dtype);
    }
}

int64_t integer_at(const heedful_array &array, const char *at) {
    return array.dtype == HEEDFUL_INT64 ? *reinterpret_cast<const int64_t *>(at)
                                        : *reinterpret_cast<const int32_t *>(at);
}

void check_positions(const heedful_array &positions, int64_t rows) {
    REQUIRE(positions.dtype == HEEDFUL_INT32 || positions.dtype == HEEDFUL_INT64,
            "positions: has dtype code " + std::to_string(positions.dtype) + ", takes int32 or int64");
    REQUIRE(positions.ndim <= MAX_DIMS, "positions: has too many dimensions");
    const int64_t bytes = element_bytes(positions.dtype), count = count_elements(positions);
    for (int64_t i = 0; i < count; ++i) {
        int64_t rest = i, offset = 0;
        for (int32_t dim = positions.ndim - 1; dim >= 0; --dim) {
            offset += rest % positions.size[dim] * positions.stride[dim];
            rest /= positions.size[dim];
        }
        const int64_t position = integer_at(positions, static_cast<const char *>(positions.data) + offset * bytes);
        REQUIRE(position >= 0 && position < rows, "positions: has " + std::to_string(position) + ", takes 0 to " +
                                                      std::to_string(rows - 1) + ", the rows of cos");
    }
}

void copy_row(char *to, int64_t to_step, const char *from, int64_t from_step, int64_t n, int64_t bytes) {
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * to_step, from + i * from_step, size_t(bytes));
}

// The dimensions of the rows, the outermost in out's memory first, and where each array lies.
struct Rotation {
    heedful_array x, cos, sin, positions, out;
    bool indexed = false;
    int32_t dims = 0;
    int64_t size[MAX_DIMS], rows = 1;
    enum { X, COS, SIN, OUT, POSITIONS, ARRAYS };
    int64_t stride[ARRAYS][MAX_DIMS]; // in bytes
    RopeRows model = {};
    void (*kernel)(const RopeRows &rows);
    bool side_by_side;
    int64_t buffer_bytes;

    Rotation(const heedful_array &x, const heedful_array &cos, const heedful_array &sin, const heedful_array &out)
        : x(x), cos(cos), sin(sin), positions(), out(out) {}

    void append(int64_t of_size, const int64_t (&of_strides)[ARRAYS]) {
        bool merges = dims > 0;
        for (int i = 0; merges && i < ARRAYS; ++i) merges = stride[i][dims - 1] == of_size * of_strides[i];
        if (merges) size[dims - 1] *= of_size;
        else size[dims++] = of_size;
        for (int i = 0; i < ARRAYS; ++i) stride[i][dims - 1] = of_strides[i];
    }

    void order() {
        int64_t strides[ARRAYS][MAX_DIMS];
        const int32_t own_dims = indexed ? 0 : cos.ndim - 1;
        for (int32_t dim = 0; dim < x.ndim - 1; ++dim) {
            strides[X][dim] = x.stride[dim] * element_bytes(x.dtype);
            strides[OUT][dim] = out.stride[dim] * element_bytes(x.dtype);
        }
        broadcast("cos", cos, own_dims, x, strides[COS]);
        broadcast("sin", sin, own_dims, x, strides[SIN]);
        if (indexed) broadcast("positions", positions, positions.ndim, x, strides[POSITIONS]);
        else std::fill_n(strides[POSITIONS], MAX_DIMS, 0);
        // Tables without columns may have no data to step from.
        if (cos.size[cos.ndim - 1] == 0)
            for (const int table : {COS, SIN}) std::fill_n(strides[table], MAX_DIMS, 0);
        int32_t sorted[MAX_DIMS], count = 0;
        for (int32_t dim = 0; dim < x.ndim - 1; ++dim) {
            rows *= x.size[dim];
            if (x.size[dim] == 1) continue;
            int32_t at = count++;
            for (; at > 0 && std::abs(strides[OUT][sorted[at - 1]]) < std::abs(strides[OUT][dim]); --at)
                sorted[at] = sorted[at - 1];
            sorted[at] = dim;
        }
        for (int32_t index = 0; index < count; ++index) {
            int64_t of_strides[ARRAYS];
            for (int i = 0; i < ARRAYS; ++i) of_strides[i] = strides[i][sorted[index]];
            append(x.size[sorted[index]], of_strides);
        }
        if (dims == 0) append(1, {});
    }

    // Runs of rows along the innermost dimension, from row `first` to `last`.
    void run(int64_t first, int64_t last, char *buffer) const {
        int64_t index[MAX_DIMS], rest = first;
        const char *at[ARRAYS] = {static_cast<const char *>(x.data), static_cast<const char *>(cos.data),
                                  static_cast<const char *>(sin.data), static_cast<const char *>(out.data),
                                  static_cast<const char *>(positions.data)};
        for (int32_t dim = dims - 1; dim >= 0; --dim) {
            index[dim] = rest % size[dim];
            rest /= size[dim];
            for (int i = 0; i < ARRAYS; ++i) at[i] += index[dim] * stride[i][dim];
        }
        const int32_t inner = dims - 1;
        const bool one_by_one = !side_by_side || (indexed && stride[POSITIONS][inner] != 0);
        for (int64_t row = first; row < last;) {
            const int64_t count = one_by_one ? 1 : std::min(size[inner] - index[inner], last - row);
            RopeRows here = model;
            here.rows = count;
            here.x = at[X], here.cos = at[COS], here.sin = at[SIN], here.out = const_cast<char *>(at[OUT]);
            if (indexed && here.half > 0) {
                const int64_t position = integer_at(positions, at[POSITIONS]);
                here.cos += position * cos.stride[0] * element_bytes(cos.dtype);
                here.sin += position * sin.stride[0] * element_bytes(sin.dtype);
            }
            if (side_by_side) kernel(here);
            else through_buffers(here, buffer);
            row += count;
            index[inner] += count;
            for (int i = 0; i < ARRAYS; ++i) at[i] += count * stride[i][inner];
            for (int32_t dim = inner; dim > 0 && index[dim] == size[dim]; --dim) {
                index[dim] = 0;
                ++index[dim - 1];
                for (int i = 0; i < ARRAYS; ++i) at[i] += stride[i][dim - 1] - size[dim] * stride[i][dim];
            }
        }
    }

    void through_buffers(RopeRows row, char *buffer) const {
        const int64_t bytes = element_bytes(x.dtype), table_bytes = element_bytes(cos.dtype);
        const int64_t last = x.ndim - 1, of_table = cos.ndim - 1;
        char *const copy = buffer, *const cos_copy = copy + x.size[last] * 8, *const sin_copy = cos_copy + row.half * 8;
        copy_row(copy, bytes, row.x, x.stride[last] * bytes, row.size, bytes);
        copy_row(cos_copy, table_bytes, row.cos, cos.stride[of_table] * table_bytes, row.half, table_bytes);
        copy_row(sin_copy, table_bytes, row.sin, sin.stride[of_table] * table_bytes, row.half, table_bytes);
        char *const target = row.out;
        row.x = row.out = copy;
        row.cos = cos_copy;
        row.sin = sin_copy;
        kernel(row);
        copy_row(target, out.stride[last] * bytes, copy, bytes, row.size, bytes);
    }
};

void rotate(const heedful_array &x, const heedful_array &cos, const heedful_array &sin, const heedful_array *positions,
            bool interleaved, bool inverse, const heedful_array &out, const heedful_threads *threads) {
    check_array("x", x);
    check_array("cos", cos);
    check_like("sin", sin, "cos", cos);
    check_like("out", out, "x", x);
    REQUIRE(x.ndim >= 1, "x: has no dimensions, takes (..., D)");
    REQUIRE(cos.ndim >= 1 && 2 * cos.size[cos.ndim - 1] <= x.size[x.ndim - 1],
            "cos: takes (..., R) with 2 R up to x's last size");
    REQUIRE(cos.dtype == x.dtype || cos.dtype == computed_dtype(x.dtype),
            "cos: has dtype code " + std::to_string(cos.dtype) + ", takes x's or " +
                std::to_string(computed_dtype(x.dtype)));
    if (count_elements(x) == 0) return;
    Rotation turn(x, cos, sin, out);
    turn.indexed = positions && positions->data;
    if (turn.indexed) {
        turn.positions = *positions;
        REQUIRE(cos.ndim == 2, "cos: takes (P, R) where there are positions");
        check_positions(*positions, cos.size[0]);
    }
    turn.order();
    const int64_t size = x.size[x.ndim - 1], half = cos.size[cos.ndim - 1];
    turn.model.x_step = turn.stride[Rotation::X][turn.dims - 1];
    turn.model.out_step = turn.stride[Rotation::OUT][turn.dims - 1];
    turn.model.cos_step = turn.stride[Rotation::COS][turn.dims - 1];
    turn.model.sin_step = turn.stride[Rotation::SIN][turn.dims - 1];
    turn.model.half = half;
    turn.model.size = size;
    turn.model.sign = inverse ? -1.0 : 1.0;
    turn.kernel = in_use_rope().turn[interleaved][cos.dtype == computed_dtype(x.dtype)][x.dtype];
    const auto dense = [](const heedful_array &array) {
        return array.size[array.ndim - 1] == 1 || array.stride[array.ndim - 1] == 1;
    };
    turn.side_by_side = dense(x) && dense(out) && dense(cos) && dense(sin);
    turn.buffer_bytes = (size + 2 * half) * 8;
    const int64_t item_rows = std::max<int64_t>(1, ITEM_ELEMENTS / size);
    const Rotation &shared = turn;
    share_out(threads, (turn.rows + item_rows - 1) / item_rows, [&](auto claim) {
        const ScratchBlock scratch(shared.side_by_side ? 64 : size_t(shared.buffer_bytes));
        for (int64_t item = claim(); item >= 0; item = claim())
            shared.run(item * item_rows, std::min((item + 1) * item_rows, shared.rows), scratch.data());
    });
}

} // namespace

#endif

} // namespace heedful

#if !defined(HEEDFUL_TIER)

extern "C" heedful_status heedful_rope(const heedful_array *x, const heedful_array *cos, const heedful_array *sin,
                                       const heedful_array *positions, int32_t interleaved, int32_t inverse,
                                       const heedful_array *out, const heedful_threads *threads) {
    return heedful::guarded(
        [&] { heedful::rotate(*x, *cos, *sin, positions, interleaved != 0, inverse != 0, *out, threads); });
}

#endif
