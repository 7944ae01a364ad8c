/* Registers the operators with torch when the library is loaded. */
#include "attention.h"

namespace heedful {
namespace {

/* The library objects live as long as the process: torch has no use for operators that go away. An exception could
 * not leave dlopen, so a failure only shows in the operators being absent, with torch's reason on stderr. */
bool register_operators() {
    TorchLibraryHandle definitions = nullptr;
    TorchLibraryHandle cpu = nullptr;
    return aoti_torch_library_init_def("heedful", __FILE__, __LINE__, &definitions) == 0 &&
           aoti_torch_library_def(definitions, attention_forward_schema) == 0 &&
           aoti_torch_library_init_impl("heedful", "CPU", __FILE__, __LINE__, &cpu) == 0 &&
           torch_library_impl(cpu, "attention_forward", attention_forward, TORCH_SHIM_VERSION) == 0;
}

[[maybe_unused]] const bool registered = register_operators();

} // namespace
} // namespace heedful
