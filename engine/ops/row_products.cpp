// The sum over each row of a * b.
#include "tiers.h"

#include "heedful_ops/row_products.h"
#include "rows.h"

namespace heedful {

struct RowProductsKernels {
    void (*sums[4])(const RowBlock<3> &rows); // sums, a, b
};
HEEDFUL_KERNELS(RowProductsKernels, row_products)

#if defined(HEEDFUL_TIER)

namespace {

template <class In> void sum_products(const RowBlock<3> &rows) {
    typedef typename ComputedIn<In>::type T;
    for (int64_t row = 0; row < rows.rows; ++row) {
        const In *const a = row_of<In>(rows, 1, row), *const b = row_of<In>(rows, 2, row);
        *row_of<T>(rows, 0, row) =
            sum_of<T>(rows.columns, [=](int64_t i, auto part) { return part.load(a + i) * part.load(b + i); });
    }
}

} // namespace

const RowProductsKernels HEEDFUL_TIER::row_products = {
    {sum_products<float>, sum_products<bfloat16>, sum_products<float16>, sum_products<double>},
};

#else

namespace {

void row_products(const heedful_array &a, const heedful_array &b, const heedful_array &sums,
                  const heedful_threads *threads) {
    check_array("a", a);
    check_like("b", b, "a", a);
    REQUIRE(a.ndim > 0, "a: takes 1 dimension or more");
    const int64_t columns = a.size[a.ndim - 1];
    int64_t stride[MAX_DIMS], count = 1;
    for (int32_t dim = a.ndim - 2; dim >= 0; --dim) {
        stride[dim] = count;
        count *= a.size[dim];
    }
    stride[a.ndim - 1] = 1; // a run has its sum at the first of its columns
    check_result("sums", sums, count, computed_dtype(a.dtype));
    if (columns == 0 && count > 0) std::memset(sums.data, 0, size_t(count * element_bytes(sums.dtype)));
    const auto kernel = in_use_row_products().sums[a.dtype];
    const Rows loop(
        a.ndim, a.size,
        {Operand(sums.data, element_bytes(sums.dtype), stride, WRITTEN), Operand(a, READ), Operand(b, READ)});
    loop.run(threads, 0, [=](const RowBlock<3> &rows, int64_t, char *) { kernel(rows); });
}

} // namespace

#endif

} // namespace heedful

#if !defined(HEEDFUL_TIER)

extern "C" heedful_status heedful_row_products(const heedful_array *a, const heedful_array *b,
                                               const heedful_array *sums, const heedful_threads *threads) {
    return heedful::guarded([&] { heedful::row_products(*a, *b, *sums, threads); });
}

#endif
