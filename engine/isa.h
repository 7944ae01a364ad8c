// The instruction-set tiers of this build and the one that this process uses.
#pragma once

#include "kernels/tier.h"

namespace heedful {

// The best tier that the processor runs and that HEEDFUL_ISA allows; read once.
const Tier &selected_tier();

} // namespace heedful
