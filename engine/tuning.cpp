#include "tuning.h"

#include <atomic>
#include <string>

#include <unistd.h>

#include "error.h"
#include "heedful.h"

namespace heedful {
namespace {

struct Constant {
    const char *name;
    int64_t least, most, multiple;
};
constexpr Constant CONSTANTS[TUNABLE_COUNT] = {
    {"item_bytes", 1 << 14, 1 << 26, 1}, // queries, outputs and sums of a forward work item
    {"direct_rows", 1, 24, 1},           // rows up to which keys are read in place
    {"prefetch_bytes", 64, 1 << 22, 1},  // how far ahead keys read in place are asked for
    {"backward_keys", 64, 256, 64},      // keys of a backward work item
    {"backward_rows", 24, 192, 24},      // rows whose weights the backward keeps at once
};

std::atomic<int64_t> values[TUNABLE_COUNT];

} // namespace

int64_t tuned(Tunable which, int64_t otherwise) {
    const int64_t value = values[which].load(std::memory_order_relaxed);
    return value > 0 ? value : otherwise;
}

int64_t l2_bytes() {
    static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
        const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
        const long found = 0;
#endif
        return found > 0 ? int64_t(found) : int64_t(1) << 20;
    }();
    return bytes;
}

} // namespace heedful

using namespace heedful;

extern "C" int32_t heedful_tuning_count(void) { return TUNABLE_COUNT; }

extern "C" const char *heedful_tuning_name(int32_t index) {
    return index >= 0 && index < TUNABLE_COUNT ? CONSTANTS[index].name : "";
}

extern "C" int64_t heedful_tuning_get(int32_t index) {
    return index >= 0 && index < TUNABLE_COUNT ? values[index].load() : 0;
}

extern "C" heedful_status heedful_tuning_set(int32_t index, int64_t value) {
    return guarded([&] {
        REQUIRE(index >= 0 && index < TUNABLE_COUNT, "tuning: no constant has index " + std::to_string(index));
        const Constant &constant = CONSTANTS[index];
        REQUIRE(value == 0 || (value >= constant.least && value <= constant.most && value % constant.multiple == 0),
                std::string(constant.name) + ": is " + std::to_string(value) + ", takes 0 or a multiple of " +
                    std::to_string(constant.multiple) + " from " + std::to_string(constant.least) + " to " +
                    std::to_string(constant.most));
        values[index] = value;
    });
}
