#include <immintrin.h>

#include "tier.h"

namespace heedful {
namespace {
#include "table.h"
} // namespace

const Tier TIER_AVX512_BF16 = tier<Paired>("avx512_bf16");

} // namespace heedful
