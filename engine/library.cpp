// What the library says of itself: version, last error, ceilings of the machine.

#include <chrono>
#include <cstring>
#include <new>
#include <string>

#include "error.h"
#include "isa.h"
#include "scratch.h"

#ifndef HEEDFUL_VERSION
#error "the build defines HEEDFUL_VERSION"
#endif

namespace heedful {
namespace {

thread_local char error_message[512];

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

} // namespace

void set_error_message(const char *text) {
    std::strncpy(error_message, text, sizeof error_message - 1);
    error_message[sizeof error_message - 1] = '\0';
}

} // namespace heedful

using namespace heedful;

extern "C" const char *heedful_error_message(void) { return error_message; }
extern "C" const char *heedful_version(void) { return HEEDFUL_VERSION; }
extern "C" int32_t heedful_abi_version(void) { return HEEDFUL_ABI_VERSION; }

// The best of short rounds: on a shared machine the slower ones measure somebody else.
extern "C" double heedful_peak_flops(int32_t dtype, double seconds) {
    if (dtype < HEEDFUL_FLOAT32 || dtype > HEEDFUL_FLOAT64) return 0;
    const auto burn = selected_tier().burn[dtype];
    double best = 0;
    for (const double end = now() + seconds; now() < end;) {
        const double begin = now();
        const double done = burn(100000);
        best = std::max(best, done / (now() - begin));
    }
    return best;
}

extern "C" double heedful_read_bandwidth(size_t bytes, double seconds) {
    char *const data = new (std::nothrow) char[bytes];
    if (!data) return 0;
    std::memset(data, 1, bytes);
    const auto read = selected_tier().read;
    volatile double sink = read(data, bytes);
    double best = 0;
    for (const double end = now() + seconds; now() < end;) {
        const double begin = now();
        sink = sink + read(data, bytes);
        best = std::max(best, double(bytes) / (now() - begin));
    }
    delete[] data;
    return best;
}
