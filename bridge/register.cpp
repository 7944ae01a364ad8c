/* Registers the operators with torch when the library is loaded. */
#include "attention.h"
#include "hook.h"
#include "masks.h"

namespace heedful {
namespace {

bool add(TorchLibraryHandle definitions, TorchLibraryHandle cpu, const char *name, const char *schema,
         void (*kernel)(StableIValue *, uint64_t, uint64_t)) {
    return aoti_torch_library_def(definitions, schema) == 0 &&
           torch_library_impl(cpu, name, kernel, TORCH_SHIM_VERSION) == 0;
}

/* The library objects live as long as the process: torch has no use for operators that go away. An exception could
 * not leave dlopen, so a failure only shows in the operators being absent, with torch's reason on stderr. */
bool register_operators() {
    TorchLibraryHandle definitions = nullptr;
    TorchLibraryHandle cpu = nullptr;
    return aoti_torch_library_init_def("heedful", __FILE__, __LINE__, &definitions) == 0 &&
           aoti_torch_library_init_impl("heedful", "CPU", __FILE__, __LINE__, &cpu) == 0 &&
           add(definitions, cpu, "attention_forward", attention_forward_schema, attention_forward) &&
           add(definitions, cpu, "attention_backward", attention_backward_schema, attention_backward) &&
           add(definitions, cpu, "attention_weights", attention_weights_schema, attention_weights) &&
           add(definitions, cpu, "attention_weights_sparse", attention_weights_sparse_schema,
               attention_weights_sparse) &&
           add(definitions, cpu, "mask_band", mask_band_schema, mask_band) &&
           add(definitions, cpu, "mask_tiles", mask_tiles_schema, mask_tiles) &&
           add(definitions, cpu, "sdpa_hook", sdpa_hook_schema, sdpa_hook) &&
           add(definitions, cpu, "sdpa_bypass", sdpa_bypass_schema, sdpa_bypass) &&
           add(definitions, cpu, "sdpa_calls", sdpa_calls_schema, sdpa_calls);
}

[[maybe_unused]] const bool registered = register_operators();

} // namespace
} // namespace heedful
