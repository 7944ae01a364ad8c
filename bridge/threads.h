/* Parallel work on torch's own threads. */
#ifndef HEEDFUL_BRIDGE_THREADS_H
#define HEEDFUL_BRIDGE_THREADS_H

#include "heedful.h"

namespace heedful {

/* The threads that one engine call may use: torch.get_num_threads() of them, and only the caller's own where
 * that is 1 or where the process was forked. */
heedful_threads torch_threads();

} // namespace heedful

#endif
