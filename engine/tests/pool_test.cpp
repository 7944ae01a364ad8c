// The engine's own threads: every index once, whoever asks and however many; the same bits as one thread; a forked
// child.

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>

#include "checks.h"

namespace {

struct Own {
    heedful_threads threads;
    heedful_status status;
    explicit Own(int64_t count) : status(heedful_pool_create(count, &threads)) {}
    ~Own() { heedful_pool_destroy(&threads); }
};

struct Counted {
    std::vector<std::atomic<int>> seen;
    explicit Counted(int64_t count) : seen(size_t(count)) {}
    static void count(void *argument, int64_t index) { ++static_cast<Counted *>(argument)->seen[size_t(index)]; }
};

bool runs_every_index_once(const heedful_threads &threads, int64_t count) {
    Counted counted(count);
    threads.run(threads.pool, count, Counted::count, &counted);
    for (const std::atomic<int> &seen : counted.seen)
        EXPECT(seen == 1, "an index of " + std::to_string(count) + " ran " + std::to_string(seen) + " times");
    return true;
}

bool check_indices(int rounds) {
    for (int64_t size : {2, 3, 8}) {
        const Own own(size);
        EXPECT(own.status == HEEDFUL_OK && own.threads.count == size, "a pool was not made");
        for (int64_t count : {0, 1, 2, 3, 7, 100})
            for (int round = 0; round < rounds; ++round)
                if (!runs_every_index_once(own.threads, count)) return false;
    }
    return true;
}

bool check_callers_at_once(int rounds) {
    const Own own(3);
    std::atomic<bool> good{true};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([&, caller] {
            for (int round = 0; round < rounds; ++round)
                if (!runs_every_index_once(own.threads, 1 + (round + caller) % 5)) good = false;
        });
    for (std::thread &caller : callers) caller.join();
    return good;
}

// Both indices must be at work at once to get on.
bool check_that_others_help() {
    const Own own(2);
    std::atomic<int> there{0};
    for (int round = 1; round <= 20; ++round) {
        if (round % 2) std::this_thread::sleep_for(std::chrono::milliseconds(2)); // the other thread sleeps by then
        own.threads.run(
            own.threads.pool, 2,
            [](void *argument, int64_t) {
                std::atomic<int> &count = *static_cast<std::atomic<int> *>(argument);
                const int wanted = count.fetch_add(1) / 2 * 2 + 2;
                while (count.load() < wanted) std::this_thread::yield();
            },
            &there);
        EXPECT(there == 2 * round, "an index is missing");
    }
    return true;
}

bool check_calls(int rounds) {
    const Own own(3);
    Limits limits;
    for (int round = 0; round < rounds; ++round) {
        Source source(uint64_t(round) + 301);
        const Problem p = reference::random_problem(source, limits);
        const Forward alone(p, 1);
        std::atomic<bool> same{true};
        std::vector<std::thread> callers;
        for (int caller = 0; caller < 3; ++caller)
            callers.emplace_back([&] {
                const Forward shared(p, own.threads);
                if (shared.status != HEEDFUL_OK || shared.out.memory != alone.out.memory) same = false;
            });
        for (std::thread &caller : callers) caller.join();
        EXPECT(same, "call " + std::to_string(round) + " (" + describe(p) + "): a pool gives other bits");
    }
    return true;
}

bool child_is_well(const Own &inherited) {
    if (!runs_every_index_once(inherited.threads, 50)) return false;
    heedful_threads copy = inherited.threads;
    heedful_pool_destroy(&copy);
#if !defined(__SANITIZE_THREAD__) // which starts no threads in such a child
    const Own own(2);
    return own.status == HEEDFUL_OK && runs_every_index_once(own.threads, 50);
#else
    return true;
#endif
}

// While others keep the pool busy, so that its mutex may be held when the child is made. They allocate nothing: unlike
// the C library's, AddressSanitizer's allocator may be left locked in the child.
bool check_fork(int rounds) {
    const Own own(3);
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        Counted counted(3);
        while (!stop) own.threads.run(own.threads.pool, 3, Counted::count, &counted);
    });
    bool good = true;
    for (int round = 0; round < rounds && good; ++round) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(20);
            _exit(child_is_well(own) ? 0 : 1);
        }
        int status = 0;
        good = child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    stop = true;
    busy.join();
    EXPECT(good, "a forked child did not end well");
    return true;
}

bool check_arguments() {
    Own own(0);
    EXPECT(own.status == HEEDFUL_OK && own.threads.count >= 1, "0 is not as many threads as processors");
    const Own one(1);
    EXPECT(one.status == HEEDFUL_OK && one.threads.count == 1 && !one.threads.run, "one thread is not the caller's");
    for (int64_t count : {int64_t(-1), int64_t(1) << 40}) {
        const Own wrong(count);
        EXPECT(wrong.status == HEEDFUL_INVALID_ARGUMENT && wrong.threads.count == 1 && !wrong.threads.run,
               "a wrong count is taken");
        EXPECT(std::string(heedful_error_message()).find("count") == 0, "a wrong count is not named");
    }
    EXPECT(heedful_pool_create(2, nullptr) == HEEDFUL_INVALID_ARGUMENT, "NULL is taken");
    heedful_pool_destroy(nullptr);
    for (int again = 0; again < 2; ++again) {
        heedful_pool_destroy(&own.threads);
        EXPECT(own.threads.count == 1 && !own.threads.run && !own.threads.pool, "a pool that ended is still there");
    }
    heedful_threads foreign = {3, reference::run_on_threads, &own};
    heedful_pool_destroy(&foreign);
    return true;
}

} // namespace

int main(int argc, char **argv) {
    const int rounds = begin(argc, argv, 60);
    if (!check_arguments() || !check_indices(5 * rounds) || !check_callers_at_once(20 * rounds) ||
        !check_that_others_help() || !check_calls(rounds) || !check_fork(rounds / 4))
        return 1;
    return end();
}
