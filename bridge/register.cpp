/* Registers the operators with torch when the library is loaded. */
#include <string>

#include "attention.h"
#include "hook.h"
#include "launches.h"
#include "masks.h"
#include "operator.h"

namespace heedful {
namespace {

/* They live as long as the process: torch has no use for operators that go away. */
struct Libraries {
    TorchLibraryHandle definitions = nullptr, cpu = nullptr, cuda = nullptr;
    bool made = aoti_torch_library_init_def("heedful", __FILE__, __LINE__, &definitions) == 0 &&
                aoti_torch_library_init_impl("heedful", "CPU", __FILE__, __LINE__, &cpu) == 0 &&
                aoti_torch_library_init_impl("heedful", "CUDA", __FILE__, __LINE__, &cuda) == 0;
};

const Libraries &libraries() {
    static const Libraries made;
    return made;
}

std::string name_of(const std::string &schema) { return schema.substr(0, schema.find('(')); }

[[maybe_unused]] const bool registered =
    register_operator(attention_forward_schema, attention_forward) &&
    register_operator(attention_backward_schema, attention_backward) &&
    register_operator(attention_weights_schema, attention_weights) &&
    register_operator(attention_weights_sparse_schema, attention_weights_sparse) &&
    register_operator(mask_band_schema, mask_band) && register_operator(mask_tiles_schema, mask_tiles) &&
    register_operator(sdpa_hook_schema, sdpa_hook) && register_operator(sdpa_bypass_schema, sdpa_bypass) &&
    register_operator(sdpa_calls_schema, sdpa_calls) && register_operator(launches_keep_schema, launches_keep) &&
    register_operator(launches_forget_schema, launches_forget) &&
    register_operator(launches_run_schema, launches_run) && register_for_cuda(launches_run_schema, launches_run) &&
    register_operator(launches_run_one_schema, launches_run_one) &&
    register_for_cuda(launches_run_one_schema, launches_run_one) &&
    register_operator(launches_time_schema, launches_time) && register_for_cuda(launches_time_schema, launches_time);

} // namespace

bool register_operator(const char *schema, void (*kernel)(StableIValue *, uint64_t, uint64_t)) {
    return libraries().made && aoti_torch_library_def(libraries().definitions, schema) == 0 &&
           torch_library_impl(libraries().cpu, name_of(schema).c_str(), kernel, TORCH_SHIM_VERSION) == 0;
}

bool register_for_cuda(const char *schema, void (*kernel)(StableIValue *, uint64_t, uint64_t)) {
    return torch_library_impl(libraries().cuda, name_of(schema).c_str(), kernel, TORCH_SHIM_VERSION) == 0;
}

} // namespace heedful
