// The engine's constants that a machine may have measured for itself.
#pragma once

#include <cstdint>

namespace heedful {

enum Tunable { ITEM_BYTES, DIRECT_ROWS, PREFETCH_BYTES, BACKWARD_KEYS, BACKWARD_ROWS, TUNABLE_COUNT };

// The value that was set, or the engine's own choice.
int64_t tuned(Tunable which, int64_t otherwise);

// The size of a core's L2 cache, 1 MiB where the system does not say.
int64_t l2_bytes();

} // namespace heedful
