// Runs the fuzz target on inputs made from seeds, where libFuzzer is not at hand:
//
//     attention_fuzz [--seconds N] [--count N] [--seed N]
//
// The target runs in a child process, so that whatever ends it (a sanitizer, a wrong result, a call that does not
// return) is followed by the seed that did it. --seed alone runs that seed and no other.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

namespace {

constexpr unsigned SECONDS_PER_INPUT = 60;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Progress {
    volatile uint64_t seed, count;
};

void run(Progress &progress, uint64_t seed, double seconds, uint64_t count) {
    const double end = now() + seconds;
    for (; progress.count < count && now() < end; ++seed) {
        progress.seed = seed;
        std::mt19937_64 generator(seed);
        std::vector<uint8_t> input(64 + generator() % 960);
        for (uint8_t &byte : input) byte = uint8_t(generator());
        alarm(SECONDS_PER_INPUT);
        LLVMFuzzerTestOneInput(input.data(), input.size());
        progress.count = progress.count + 1;
    }
    alarm(0);
}

} // namespace

int main(int argc, char **argv) {
    double seconds = 1e9;
    uint64_t count = UINT64_MAX, seed = 0;
    bool limited = false, seeded = false;
    for (int i = 1; i < argc; i += 2) {
        const bool valued = i + 1 < argc;
        if (valued && !std::strcmp(argv[i], "--seconds")) seconds = std::atof(argv[i + 1]), limited = true;
        else if (valued && !std::strcmp(argv[i], "--count"))
            count = std::strtoull(argv[i + 1], nullptr, 10), limited = true;
        else if (valued && !std::strcmp(argv[i], "--seed"))
            seed = std::strtoull(argv[i + 1], nullptr, 10), seeded = true;
        else return std::fprintf(stderr, "usage: %s [--seconds N] [--count N] [--seed N]\n", argv[0]), 2;
    }
    if (seeded && !limited) count = 1;
    if (!seeded) seed = uint64_t(std::random_device()()) << 20;

    void *const shared = mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) return std::perror("mmap"), 2;
    Progress &progress = *static_cast<Progress *>(shared);
    const pid_t child = fork();
    if (child < 0) return std::perror("fork"), 2;
    if (child == 0) {
        run(progress, seed, seconds, count);
        std::exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        std::printf("%llu calls held, seeds from %llu\n", (unsigned long long)progress.count, (unsigned long long)seed);
        return 0;
    }
    std::printf("%s by seed %llu; again: %s --seed %llu\n",
                WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM ? "no end in 60 s" : "failed",
                (unsigned long long)progress.seed, argv[0], (unsigned long long)progress.seed);
    return 1;
}
