// Every aarch64 processor has NEON: this tier differs from the portable one in that it counts on 32 registers and on
// the processor's own conversions.
#define HEEDFUL_TIER_NEON

#include <arm_neon.h>

#include "tier.h"

namespace heedful {
namespace {
#include "table.h"
} // namespace

const Tier TIER_NEON = tier<Single<float, bfloat16>>("neon");

} // namespace heedful
