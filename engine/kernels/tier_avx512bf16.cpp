#include <immintrin.h>

#include "tier.h"

namespace heedful {
namespace {
#include "simd.h"

#include "arithmetic.h"

#include "tiles.h"

#include "pack.h"

#include "forward.h"

#include "burn.h"

typedef Paired BFloat16;
} // namespace

const Tier TIER_AVX512_BF16 = {
    "avx512_bf16",
    {Forward<Single<float, float>>::kernel(), Forward<BFloat16>::kernel(), Forward<Single<float, float16>>::kernel(),
     Forward<Single<double, double>>::kernel()},
    {burn<Single<float, float>>, burn<BFloat16>, burn<Single<float, float16>>, burn<Single<double, double>>},
    read_all,
};

} // namespace heedful
