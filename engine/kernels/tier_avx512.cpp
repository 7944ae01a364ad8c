#include <immintrin.h>

#include "tier.h"

namespace heedful {
namespace {
#include "table.h"
} // namespace

const Tier TIER_AVX512 = tier<Single<float, bfloat16>>("avx512");

} // namespace heedful
