// Every kernel of one tier. Included by each tier's source, inside its anonymous namespace; defines tier<BFloat16>
// for the arithmetic that the tier has for bfloat16.

// clang-format off: each needs the ones before it.
#include "simd.h"
#include "arithmetic.h"
#include "tiles.h"
#include "pack.h"
#include "features.h"
#include "direct.h"
#include "forward.h"
#include "backward.h"
#include "direct_backward.h"
#include "weights.h"
#include "burn.h"
// clang-format on

template <class BFloat16> constexpr Tier tier(const char *name) {
    typedef Single<float, float> Float32;
    typedef Single<float, float16> Float16;
    typedef Single<double, double> Float64;
    return {
        name,
        {Forward<Float32>::kernel(), Forward<BFloat16>::kernel(), Forward<Float16>::kernel(),
         Forward<Float64>::kernel()},
        {Backward<Float32>::kernel(), Backward<BFloat16>::kernel(), Backward<Float16>::kernel(),
         Backward<Float64>::kernel()},
        {Weights<Float32>::kernel(), Weights<BFloat16>::kernel(), Weights<Float16>::kernel(),
         Weights<Float64>::kernel()},
        {burn<Float32>, burn<BFloat16>, burn<Float16>, burn<Float64>},
        read_all,
    };
}
