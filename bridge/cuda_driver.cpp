#include "cuda_driver.h"

#include <dlfcn.h>

#include <string>

#include "tensor.h"

namespace heedful {
namespace {

template <typename Function> bool find(void *library, const char *name, Function &function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
}

CudaDriver load() {
    CudaDriver driver = {};
    void *const library = dlopen("libcuda.so.1", RTLD_NOW);
    const bool found = library != nullptr && find(library, "cuLaunchKernelEx", driver.launch_kernel) &&
                       find(library, "cuFuncGetParamInfo", driver.parameter_info) &&
                       find(library, "cuTensorMapEncodeTiled", driver.encode_tiled) &&
                       find(library, "cuTensorMapReplaceAddress", driver.replace_address) &&
                       find(library, "cuGetErrorString", driver.error_string) &&
                       find(library, "cuDevicePrimaryCtxRetain", driver.retain_context) &&
                       find(library, "cuCtxSetCurrent", driver.set_context);
    return found ? driver : CudaDriver{};
}

/* Of libtorch_cuda, which only a torch for CUDA has: null elsewhere. */
struct CudaTorch {
    AOTITorchError (*current_device)(int32_t *device) = nullptr;
    AOTITorchError (*current_stream)(int32_t device, void **stream) = nullptr;

    CudaTorch() {
        void *const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
        if (library == nullptr || !find(library, "aoti_torch_get_current_cuda_stream", current_stream) ||
            !find(library, "aoti_torch_get_current_device_index", current_device))
            current_device = nullptr;
    }
};

} // namespace

bool current_stream(int32_t device, void *&stream) {
    static const CudaTorch torch;
    if (torch.current_device == nullptr) return true;
    int32_t current = -1;
    return torch.current_device(&current) == 0 && current == device && torch.current_stream(device, &stream) == 0;
}

const CudaDriver &cuda_driver() {
    static const CudaDriver driver = load();
    return driver;
}

void check_cuda(CudaResult result, const char *what) {
    if (result == 0) return;
    const char *text = nullptr;
    if (cuda_driver().error_string(result, &text) != 0 || text == nullptr) text = "an unknown error";
    fail(std::string(what) + ": CUDA error " + std::to_string(result) + ", " + text);
}

} // namespace heedful
