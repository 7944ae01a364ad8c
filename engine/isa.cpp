#include "isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "heedful.h"

namespace heedful {
namespace {

struct Entry {
    const Tier *tier;
    bool (*runnable)();
};

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

const Entry ENTRIES[] = {
    {&TIER_PORTABLE, [] { return true; }},
#if defined(__x86_64__)
    {&TIER_AVX2, has_avx2},
    {&TIER_AVX512, has_avx512},
    {&TIER_AVX512_BF16, has_avx512_bf16},
#elif defined(__aarch64__)
    {&TIER_NEON, [] { return true; }}, // every aarch64 processor has it
#endif
};
constexpr int COUNT = sizeof ENTRIES / sizeof *ENTRIES;

int choose() {
    int cap = COUNT - 1;
    if (const char *name = std::getenv("HEEDFUL_ISA"); name && *name) {
        int found = -1;
        for (int i = 0; i < COUNT; ++i)
            if (!std::strcmp(ENTRIES[i].tier->name, name)) found = i;
        if (found >= 0) {
            cap = found;
        } else {
            std::fprintf(stderr, "heedful: HEEDFUL_ISA=%s is not a tier of this build; it takes", name);
            for (const Entry &entry : ENTRIES) std::fprintf(stderr, " %s", entry.tier->name);
            std::fprintf(stderr, "; using the best one\n");
        }
    }
    while (!ENTRIES[cap].runnable()) --cap;
    return cap;
}

int selected() {
    static const int index = choose();
    return index;
}

} // namespace

const Tier &selected_tier() { return *ENTRIES[selected()].tier; }

} // namespace heedful

using namespace heedful;

extern "C" int32_t heedful_isa_count(void) { return COUNT; }

extern "C" const char *heedful_isa_name(int32_t index) {
    return index >= 0 && index < COUNT ? ENTRIES[index].tier->name : "";
}

extern "C" int32_t heedful_isa_runnable(int32_t index) {
    return index >= 0 && index < COUNT && ENTRIES[index].runnable();
}

extern "C" int32_t heedful_isa_selected(void) { return selected(); }
