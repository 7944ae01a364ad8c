// Threads for callers that have none of their own: a pool that fills in a heedful_threads.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sched.h>

#include "error.h"
#include "heedful.h"
#include "workers.h"

namespace heedful {
namespace {

// How often a thread that is out of work looks for more before it sleeps, some ten microseconds: to be woken takes as
// long as the pauses between the parts of one call, or between the calls of a loop.
constexpr int SPINS = 600;
constexpr int64_t MAX_THREADS = 4096;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A forked child inherits a pool's bookkeeping, perhaps a locked mutex, and none of its threads.
std::atomic<uint64_t> forks{0};

void watch_forks() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
        forks.fetch_add(1, std::memory_order_relaxed);
        WorkerShare::forget_other_threads();
    });
    (void)registered;
}

// One run, on the stack of the thread that asked for it. Indices are claimed under the pool's mutex.
struct Job {
    void (*body)(void *argument, int64_t index);
    void *argument;
    int64_t count;
    int64_t claimed = 0;
    Job *next = nullptr;
    std::atomic<int64_t> finished{0};

    bool done() const { return finished.load(std::memory_order_acquire) == count; }
};

class Pool {
  public:
    explicit Pool(int64_t workers) : generation_(forks.load(std::memory_order_relaxed)) {
        try {
            threads_.reserve(size_t(workers));
            for (int64_t i = 0; i < workers; ++i) threads_.emplace_back([this] { work(); });
        } catch (...) {
            close();
            throw;
        }
    }
    ~Pool() { close(); }
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    bool forked() const { return generation_ != forks.load(std::memory_order_relaxed); }

    void run(int64_t count, void (*body)(void *, int64_t), void *argument) {
        Job job{body, argument, count};
        std::unique_lock<std::mutex> lock(mutex_);
        job.next = first_;
        first_ = &job;
        // Threads that are still looking come by themselves.
        for (int64_t i = std::min(sleeping_, count - 1); i > 0; --i) wake_.notify_one();
        while (job.claimed < count) {
            const int64_t index = claim(job);
            lock.unlock();
            body(argument, index);
            job.finished.fetch_add(1, std::memory_order_acq_rel);
            lock.lock();
        }
        lock.unlock();
        for (int i = 0; i < SPINS; ++i, pause())
            if (job.done()) return;
        lock.lock();
        finished_.wait(lock, [&] { return job.done(); });
    }

  private:
    // The next index of a job that has one left; the mutex is held.
    int64_t claim(Job &job) {
        const int64_t index = job.claimed++;
        if (job.claimed == job.count) {
            Job **place = &first_;
            while (*place != &job) place = &(*place)->next;
            *place = job.next;
        }
        open_.store(first_ != nullptr, std::memory_order_relaxed);
        return index;
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            if (!first_ && !closing_) {
                lock.unlock();
                for (int i = 0; i < SPINS && !open_.load(std::memory_order_relaxed); ++i) pause();
                lock.lock();
                ++sleeping_;
                wake_.wait(lock, [this] { return first_ || closing_; });
                --sleeping_;
            }
            if (!first_) return;
            Job &job = *first_;
            const int64_t index = claim(job), count = job.count;
            lock.unlock();
            job.body(job.argument, index);
            // The job may be gone once its last index is counted.
            const bool last = job.finished.fetch_add(1, std::memory_order_acq_rel) + 1 == count;
            lock.lock();
            if (last) finished_.notify_all();
        }
    }

    void close() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
        }
        wake_.notify_all();
        for (std::thread &thread : threads_) thread.join();
    }

    const uint64_t generation_;
    std::mutex mutex_;
    std::condition_variable wake_, finished_;
    Job *first_ = nullptr; // of those with indices left
    std::atomic<bool> open_{false};
    int64_t sleeping_ = 0;
    bool closing_ = false;
    std::vector<std::thread> threads_;
};

void run_on_pool(void *pool, int64_t count, void (*body)(void *, int64_t), void *argument) {
    Pool &own = *static_cast<Pool *>(pool);
    if (count > 1 && !own.forked()) return own.run(count, body, argument);
    for (int64_t index = 0; index < count; ++index) body(argument, index);
}

int64_t processors() {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
    return std::max(1u, std::thread::hardware_concurrency()); // more of them than the set holds
}

} // namespace
} // namespace heedful

extern "C" heedful_status heedful_pool_create(int64_t count, heedful_threads *threads) {
    using namespace heedful;
    return guarded([&] {
        REQUIRE(threads, "threads: is NULL");
        *threads = {1, nullptr, nullptr};
        REQUIRE(count >= 0 && count <= MAX_THREADS,
                "count: is " + std::to_string(count) + ", takes 0 to " + std::to_string(MAX_THREADS));
        if (count == 0) count = processors();
        if (count == 1) return;
        watch_forks();
        try {
            *threads = {count, run_on_pool, new Pool(count - 1)};
        } catch (const std::system_error &error) {
            throw Error(HEEDFUL_OUT_OF_MEMORY,
                        "count: the system did not start " + std::to_string(count - 1) + " threads: " + error.what());
        }
    });
}

extern "C" void heedful_pool_destroy(heedful_threads *threads) {
    using namespace heedful;
    if (!threads) return;
    Pool *const pool = threads->run == run_on_pool ? static_cast<Pool *>(threads->pool) : nullptr;
    *threads = {1, nullptr, nullptr};
    // A child has no threads to wait for, and cannot know in what state the rest was when it was made.
    if (pool && !pool->forked()) delete pool;
}
