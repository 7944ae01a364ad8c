#include "threads.h"

#include <pthread.h>

#include <atomic>

#include "torch_shim.h"

namespace heedful {
namespace {

/* A forked child inherits the pool's bookkeeping and none of its threads: a parallel region there would wait for
 * ever. Whether the parent had started the pool cannot be asked, so every child stays on its own thread. */
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Work {
    void (*body)(void *argument, int64_t index);
    void *argument;
};

void run_range(int64_t begin, int64_t end, void *context) {
    const Work *work = static_cast<const Work *>(context);
    for (int64_t index = begin; index < end; ++index) work->body(work->argument, index);
}

void run_on_torch_threads(void *, int64_t count, void (*body)(void *, int64_t), void *argument) {
    Work work{body, argument};
    /* Work never throws, so where torch reports an error it has not begun: it could not start its threads. */
    if (torch_parallel_for(0, count, 1, run_range, &work) != 0) run_range(0, count, &work);
}

void run_here(void *, int64_t count, void (*body)(void *, int64_t), void *argument) {
    Work work{body, argument};
    run_range(0, count, &work);
}

} // namespace

heedful_threads torch_threads() {
    uint32_t count = 1;
    if (!forked.load(std::memory_order_relaxed)) torch_get_num_threads(&count);
    return {count, count > 1 ? run_on_torch_threads : run_here, nullptr};
}

} // namespace heedful
