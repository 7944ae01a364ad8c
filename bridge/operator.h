/* Registration of operators with torch, from whichever file defines one. */
#ifndef HEEDFUL_BRIDGE_OPERATOR_H
#define HEEDFUL_BRIDGE_OPERATOR_H

#include "torch_shim.h"

namespace heedful {

/* Adds heedful::<name>, name(...) -> ... being the schema, and its kernel for the CPU; for the initialiser of a static
 * variable. An exception could not leave dlopen, so a failure only shows in the operator being absent, with torch's
 * reason on stderr. */
bool register_operator(const char *schema, void (*kernel)(StableIValue *stack, uint64_t, uint64_t));
/* The same kernel for CUDA tensors, of an operator that is registered. */
bool register_for_cuda(const char *schema, void (*kernel)(StableIValue *stack, uint64_t, uint64_t));

} // namespace heedful

#endif
