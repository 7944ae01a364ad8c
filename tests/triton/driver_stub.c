/* A CUDA driver that launches nothing and remembers what it was asked for: grid, block, shared memory, stream,
 * whether it may begin early, parameters. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { KERNELS = 8, PARAMETERS = 256 };

/* Set by the test: of each kernel, numbered from 1, how many parameters there are and how large each is. */
size_t stub_sizes[KERNELS][PARAMETERS];
size_t stub_counts[KERNELS];
int stub_next_result;
/* Whether a thread has to set a context before it may do anything. */
int stub_wants_context;
static _Thread_local int has_context;

static int refused(void) { return stub_wants_context && !has_context ? 201 : 0; }

/* Read by the test. */
int stub_launches;
uint64_t stub_shapes[64][7];
unsigned char stub_parameters[64][PARAMETERS][128];

struct config {
    unsigned grid[3], block[3], shared;
    void *stream;
    const int *attributes;
    unsigned count;
};

int cuLaunchKernelEx(const struct config *config, void *function, void **parameters, void **extra) {
    size_t kernel = (size_t)function;
    (void)extra;
    if (stub_next_result != 0) {
        int result = stub_next_result;
        stub_next_result = 0;
        return result;
    }
    if (refused()) return refused();
    int dependent = config->count == 1 && config->attributes[0] == 6 && config->attributes[2] == 1;
    uint64_t shape[7] = {kernel, config->grid[0], (uint64_t)config->grid[1] * config->grid[2], config->block[0],
                         config->shared, (uint64_t)config->stream, (uint64_t)dependent};
    memcpy(stub_shapes[stub_launches % 64], shape, sizeof shape);
    for (size_t index = 0; index < stub_counts[kernel]; ++index)
        memcpy(stub_parameters[stub_launches % 64][index], parameters[index], stub_sizes[kernel][index]);
    ++stub_launches;
    return 0;
}

int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size) {
    if (index >= stub_counts[(size_t)function]) return 1;
    *offset = 0;
    *size = stub_sizes[(size_t)function][index];
    return 0;
}

/* The map's first words: address, data type, rank, swizzle, then box, sizes and strides. */
int cuTensorMapEncodeTiled(uint64_t *map, int type, uint32_t rank, void *address, const uint64_t *sizes,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle, int promotion, int fill) {
    (void)steps, (void)interleave, (void)promotion;
    if (refused()) return refused();
    memset(map, 0, 128);
    uint64_t head[4] = {(uint64_t)address, (uint64_t)type, rank, (uint64_t)(swizzle + 16 * fill)};
    memcpy(map, head, sizeof head);
    for (uint32_t dim = 0; dim < rank; ++dim) map[4 + dim] = box[dim];
    for (uint32_t dim = 0; dim < rank; ++dim) map[8 + dim] = sizes[dim];
    for (uint32_t dim = 0; dim + 1 < rank; ++dim) map[12 + dim] = strides[dim];
    return 0;
}

int cuTensorMapReplaceAddress(uint64_t *map, void *address) {
    map[0] = (uint64_t)address;
    return refused();
}

int cuGetErrorString(int error, const char **text) {
    (void)error;
    *text = "as the test asked for";
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    *context = 0;
    return 0;
}

int cuCtxSetCurrent(void *context) {
    (void)context;
    has_context = 1;
    return 0;
}
