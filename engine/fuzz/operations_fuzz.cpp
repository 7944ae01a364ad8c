// One call of a fused operation per input: random shapes, strides, types and parameters. Half of the calls are right
// and are compared with the formulas in long double; in the other half an array is damaged, and the call may be refused
// or answered, but must stay inside the memory that it was given.
//
// LLVMFuzzerTestOneInput is libFuzzer's; driver.cpp stands in for libFuzzer where only g++ is at hand.

#include <cstdio>
#include <cstdlib>

#include "../tests/random_operations.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

namespace {

using reference::Source;

// An array that tells less than the truth, so that no right reading of it leaves its memory. Its sizes and strides are
// the owner's, so they are changed in copies that live as long as the calls.
struct Damage {
    Source &source;
    int64_t left; // arrays until the one that is damaged
    std::vector<int64_t> size, stride;

    void operator()(heedful_array &array) {
        if (left-- != 0) return;
        size.assign(array.size, array.size + array.ndim);
        stride.assign(array.stride, array.stride + array.ndim);
        const int64_t axis = source.pick(0, std::max<int64_t>(array.ndim - 1, 0));
        switch (source.pick(0, 4)) {
        case 0:
            if (array.ndim > 0) size[size_t(axis)] = source.pick(-1, std::max<int64_t>(size[size_t(axis)], 0));
            break;
        case 1:
            array.ndim = int32_t(source.pick(-1, array.ndim));
            break;
        case 2:
            array.dtype = int32_t(source.pick(HEEDFUL_BOOL, 1000));
            break;
        case 3:
            array.data = nullptr;
            break;
        default:
            if (array.ndim > 0) stride[size_t(axis)] = 0;
        }
        array.size = size.data();
        array.stride = stride.data();
    }
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Source source(data, size);
    const heedful_threads threads = {source.pick(1, 3), reference::run_on_threads, nullptr};
    reference::Operations call(source, int32_t(source.pick(0, 3)), threads.count > 1 ? &threads : nullptr);
    Damage damage{source, source.pick(0, 7), {}, {}};
    if (source.once_in(2)) call.spoil = std::ref(damage);
    if (!call.any()) std::abort();
    return 0;
}
