// Work shared out to threads that claim it, as many as one engine-wide count allows.
#pragma once

#include <algorithm>
#include <atomic>
#include <new>

#include "error.h"
#include "heedful.h"

namespace heedful {

// Threads that engine calls of this process have at work. Calls from several threads at once share the machine
// instead of bringing a pool each: a call gets what the others leave of its count, and always its own thread.
class WorkerShare {
  public:
    WorkerShare(int64_t wanted, int64_t limit) {
        int64_t before = active_.load(std::memory_order_relaxed);
        do {
            count_ = std::max<int64_t>(1, std::min(wanted, limit - before));
        } while (!active_.compare_exchange_weak(before, before + count_, std::memory_order_relaxed));
    }
    ~WorkerShare() { active_.fetch_sub(count_, std::memory_order_relaxed); }
    WorkerShare(const WorkerShare &) = delete;
    WorkerShare &operator=(const WorkerShare &) = delete;
    int64_t count() const { return count_; }
    // In a forked child, whose only thread is in no call.
    static void forget_other_threads() { active_.store(0, std::memory_order_relaxed); }

  private:
    static inline std::atomic<int64_t> active_{0};
    int64_t count_;
};

// Runs serve() on up to `items` threads, and throws what one of them met. serve takes a claim function that gives the
// next index, or -1.
template <class Serve> void share_out(const heedful_threads *threads, int64_t items, Serve serve) {
    struct Shared {
        Serve &serve;
        int64_t items;
        std::atomic<int64_t> next{0};
        std::atomic<int> status{HEEDFUL_OK};

        void work() {
            const heedful_status result = guarded([this] {
                serve([this]() -> int64_t {
                    const int64_t index = next.fetch_add(1);
                    return index < items ? index : -1;
                });
            });
            if (result != HEEDFUL_OK) status = result;
        }
    } shared{serve, items};
    const int64_t limit = threads && threads->run ? threads->count : 1;
    const WorkerShare share(std::min(limit, items), limit);
    if (share.count() > 1) {
        threads->run(
            threads->pool, share.count(), [](void *argument, int64_t) { static_cast<Shared *>(argument)->work(); },
            &shared);
    } else {
        shared.work();
    }
    if (shared.status == HEEDFUL_OUT_OF_MEMORY) throw std::bad_alloc();
    if (shared.status != HEEDFUL_OK) throw Error(heedful_status(shared.status.load()), "a worker thread failed");
}

} // namespace heedful
