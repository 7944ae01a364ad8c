#include <immintrin.h>

#include "tier.h"

namespace heedful {
namespace {
#include "table.h"
} // namespace

const Tier TIER_AVX2 = tier<Single<float, bfloat16>>("avx2");

} // namespace heedful
