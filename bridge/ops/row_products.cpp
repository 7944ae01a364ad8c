#include "heedful_ops/row_products.h"
#include "arrays.h"

namespace heedful {
namespace {

/* a and b of one shape (..., C) and dtype and any strides; sums is contiguous (...), of the type that is computed in.
 */
constexpr const char *schema = "row_products(Tensor a, Tensor b) -> Tensor";

void row_products(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor a(stack[0]), b(stack[1]);
    const heedful_array a_array = array(a, "a"), b_array = array(b, "b");
    if (a_array.ndim == 0) fail("a: takes 1 dimension or more");
    Tensor sums = empty(a_array.ndim - 1, a_array.size, computed_dtype(a_array.dtype));
    const heedful_array sums_array = array(sums, "sums");
    const heedful_threads threads = torch_threads();
    check_status(heedful_row_products(&a_array, &b_array, &sums_array, &threads));
    stack[0] = sums.release();
}

[[maybe_unused]] const bool registered = register_operator(schema, row_products);

} // namespace
} // namespace heedful
