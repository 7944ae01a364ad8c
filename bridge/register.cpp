/* Registers the operators with torch when the library is loaded. */
#include <string>

#include "attention.h"
#include "hook.h"
#include "masks.h"
#include "operator.h"

namespace heedful {
namespace {

/* They live as long as the process: torch has no use for operators that go away. */
struct Libraries {
    TorchLibraryHandle definitions = nullptr, cpu = nullptr;
    bool made = aoti_torch_library_init_def("heedful", __FILE__, __LINE__, &definitions) == 0 &&
                aoti_torch_library_init_impl("heedful", "CPU", __FILE__, __LINE__, &cpu) == 0;
};

[[maybe_unused]] const bool registered =
    register_operator(attention_forward_schema, attention_forward) &&
    register_operator(attention_backward_schema, attention_backward) &&
    register_operator(attention_weights_schema, attention_weights) &&
    register_operator(attention_weights_sparse_schema, attention_weights_sparse) &&
    register_operator(mask_band_schema, mask_band) && register_operator(mask_tiles_schema, mask_tiles) &&
    register_operator(sdpa_hook_schema, sdpa_hook) && register_operator(sdpa_bypass_schema, sdpa_bypass) &&
    register_operator(sdpa_calls_schema, sdpa_calls);

} // namespace

bool register_operator(const char *schema, void (*kernel)(StableIValue *, uint64_t, uint64_t)) {
    static const Libraries libraries;
    const std::string text = schema, name = text.substr(0, text.find('('));
    return libraries.made && aoti_torch_library_def(libraries.definitions, schema) == 0 &&
           torch_library_impl(libraries.cpu, name.c_str(), kernel, TORCH_SHIM_VERSION) == 0;
}

} // namespace heedful
