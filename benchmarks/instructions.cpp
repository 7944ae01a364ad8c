// Throughput of single 512-bit instructions, in cycles of a multiply-add, which is 1 a cycle on Zen 4.
//
//     g++ -O2 -mavx512f benchmarks/instructions.cpp -o build/instructions && taskset -c 1 build/instructions

#include <algorithm>
#include <chrono>
#include <cstdio>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

constexpr int ROUNDS = 3000000;

#define EIGHT(line) line(0) line(1) line(2) line(3) line(4) line(5) line(6) line(7)
#define REGISTERS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm16", "xmm17", "xmm18"
// Seconds of one of eight independent lines, the best of seven runs.
#define SECONDS(line)                                                                                                  \
    [] {                                                                                                               \
        double best = 1e9;                                                                                             \
        for (int run = 0; run < 7; ++run) {                                                                            \
            const double start = now();                                                                                \
            for (int round = 0; round < ROUNDS; ++round) asm volatile(EIGHT(line)::: REGISTERS);                       \
            best = std::min(best, now() - start);                                                                      \
        }                                                                                                              \
        return best / ROUNDS / 8;                                                                                      \
    }()

#define FMA(n) "vfmadd231ps %%zmm16,%%zmm17,%%zmm" #n "\n"
#define DOT(n) "vdpbf16ps %%zmm16,%%zmm17,%%zmm" #n "\n"
#define ADD(n) "vaddps %%zmm16,%%zmm" #n ",%%zmm" #n "\n"
#define MAX(n) "vmaxps %%zmm16,%%zmm" #n ",%%zmm" #n "\n"
#define REDUCE(n) "vreduceps $9,%%zmm" #n ",%%zmm" #n "\n"
#define SCALEF(n) "vscalefps %%zmm16,%%zmm" #n ",%%zmm" #n "\n"
#define CONVERT(n) "vcvtne2ps2bf16 %%zmm16,%%zmm" #n ",%%zmm" #n "\n"
#define INTEGER(n) "vpaddd %%zmm16,%%zmm" #n ",%%zmm" #n "\n"
#define FMA_ADD(n) FMA(n) "vaddps %%zmm16,%%zmm17,%%zmm18\n"
#define DOT_ADD(n) DOT(n) "vaddps %%zmm16,%%zmm17,%%zmm18\n"
#define FMA_REDUCE(n) FMA(n) "vreduceps $9,%%zmm16,%%zmm18\n"
#define FMA_SCALEF(n) FMA(n) "vscalefps %%zmm16,%%zmm17,%%zmm18\n"

} // namespace

int main() {
    const double unit = SECONDS(FMA);
    const struct {
        const char *name;
        double seconds;
    } results[] = {{"bf16 dot", SECONDS(DOT)},
                   {"add", SECONDS(ADD)},
                   {"maximum", SECONDS(MAX)},
                   {"reduce", SECONDS(REDUCE)},
                   {"scalef", SECONDS(SCALEF)},
                   {"two vectors to bf16", SECONDS(CONVERT)},
                   {"integer add", SECONDS(INTEGER)},
                   {"multiply-add and add", SECONDS(FMA_ADD)},
                   {"bf16 dot and add", SECONDS(DOT_ADD)},
                   {"multiply-add and reduce", SECONDS(FMA_REDUCE)},
                   {"multiply-add and scalef", SECONDS(FMA_SCALEF)}};
    for (const auto &result : results) std::printf("%-24s %.2f\n", result.name, result.seconds / unit);
}
