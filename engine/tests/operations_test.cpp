// The fused operations through the C interface against their formulas in long double: every dtype, any shape, strides
// and number of threads.

#include "checks.h"
#include "random_operations.h"

int main(int argc, char **argv) {
    const int rounds = begin(argc, argv, 400);
    for (int round = 0; round < rounds; ++round) {
        Source source(uint64_t(round) + 900001);
        heedful_threads storage;
        reference::Operations call(source, round % 4, threads_of(round % 3 + 1, storage));
        if (!call.any()) return std::printf("in round %d\n", round), 1;
    }
    return end();
}
