#include "tier.h"

namespace heedful {
namespace {
#include "table.h"
} // namespace

const Tier TIER_PORTABLE = tier<Single<float, bfloat16>>("portable");

} // namespace heedful
