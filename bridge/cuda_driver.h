/* The few functions of CUDA's driver that the bridge calls, looked up in the process when they are first needed:
 * building needs no CUDA, and a machine without it has no use for them. */
#ifndef HEEDFUL_BRIDGE_CUDA_DRIVER_H
#define HEEDFUL_BRIDGE_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

namespace heedful {

using CudaResult = int32_t;
constexpr CudaResult CUDA_INVALID_CONTEXT = 201;

/* What the driver calls CUtensorMap: where a copy engine finds a tensor and how it cuts it. */
struct alignas(64) TensorMap {
    uint64_t words[16];
};

/* CUlaunchAttribute and CUlaunchConfig. */
struct LaunchAttribute {
    int32_t id, padding;
    union {
        char bytes[64];
        int32_t number;
    } value;
};
constexpr int32_t PROGRAMMATIC_STREAM_SERIALIZATION = 6;
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    LaunchAttribute *attributes;
    unsigned attribute_count;
};

static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "as cuda.h has them");

/* All null where the driver or one of them is not there; names and arguments are the driver's. */
struct CudaDriver {
    CudaResult (*launch_kernel)(const LaunchConfig *config, void *function, void **parameters, void **extra);
    CudaResult (*parameter_info)(void *function, size_t index, size_t *offset, size_t *size);
    CudaResult (*encode_tiled)(TensorMap *map, int32_t data_type, uint32_t rank, void *address, const uint64_t *sizes,
                               const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                               int32_t interleave, int32_t swizzle, int32_t promotion, int32_t fill);
    CudaResult (*replace_address)(TensorMap *map, void *address);
    CudaResult (*error_string)(CudaResult error, const char **text);
    CudaResult (*retain_context)(void **context, int32_t device);
    CudaResult (*set_context)(void *context);
};

const CudaDriver &cuda_driver();

/* torch's current stream of a device, null where this torch has no CUDA; false where another device is the current one.
 */
bool current_stream(int32_t device, void *&stream);

/* Raises a RuntimeError with the driver's words, `what` in front, unless the result is 0. */
void check_cuda(CudaResult result, const char *what);

} // namespace heedful

#endif
