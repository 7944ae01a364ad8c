#include "scratch.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include <pthread.h>

#include "heedful.h"

namespace heedful {
namespace {

struct Block {
    char *data;
    size_t bytes;
};

// Never destroyed: a thread that ends after main may still give a block back.
struct Pool {
    std::mutex mutex;
    std::vector<Block> idle;
};

Pool &pool() {
    static Pool *const instance = [] {
        Pool *const made = new Pool;
        // A child forked while another thread holds the mutex would wait for that thread for ever.
        pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
        return made;
    }();
    return *instance;
}

// More idle blocks than this are freed, as many as threads that one call is likely to use; and more bytes: only the
// running gradients of long sequences are so large, and their pages are a small part of such a call.
constexpr size_t MAX_IDLE = 64, MAX_IDLE_BYTES = size_t(64) << 20;

} // namespace

ScratchBlock::ScratchBlock(size_t bytes) : data_(nullptr), bytes_((bytes + 4095) / 4096 * 4096) {
    {
        std::lock_guard<std::mutex> lock(pool().mutex);
        std::vector<Block> &idle = pool().idle;
        // The smallest that fits, and none that would waste three quarters of itself.
        auto best = idle.end();
        for (auto block = idle.begin(); block != idle.end(); ++block)
            if (block->bytes >= bytes_ && block->bytes / 4 <= bytes_ &&
                (best == idle.end() || block->bytes < best->bytes))
                best = block;
        if (best != idle.end()) {
            data_ = best->data;
            bytes_ = best->bytes;
            idle.erase(best);
        }
    }
    if (!data_) data_ = static_cast<char *>(std::aligned_alloc(4096, bytes_));
    if (!data_) throw std::bad_alloc();
#if defined(HEEDFUL_POISON_SCRATCH)
    std::memset(data_, 0xff, bytes_); // NaN in every type: a weight of zero does not silence what was never written
#endif
}

ScratchBlock::~ScratchBlock() {
    Block evicted[MAX_IDLE + 1];
    size_t count = 0;
    {
        std::lock_guard<std::mutex> lock(pool().mutex);
        std::vector<Block> &idle = pool().idle;
        idle.reserve(MAX_IDLE + 1);
        idle.push_back({data_, bytes_});
        size_t bytes = 0;
        for (const Block &block : idle) bytes += block.bytes;
        while (idle.size() > MAX_IDLE || bytes > MAX_IDLE_BYTES) {
            // The oldest first, save where the new one alone is too large.
            const size_t which = bytes_ > MAX_IDLE_BYTES ? idle.size() - 1 : 0;
            bytes -= idle[which].bytes;
            evicted[count++] = idle[which];
            idle.erase(idle.begin() + std::ptrdiff_t(which));
            if (which) break;
        }
    }
    for (size_t i = 0; i < count; ++i) std::free(evicted[i].data);
}

} // namespace heedful

extern "C" int64_t heedful_clear_caches(void) {
    using namespace heedful;
    std::vector<Block> idle;
    {
        std::lock_guard<std::mutex> lock(pool().mutex);
        idle.swap(pool().idle);
    }
    int64_t bytes = 0;
    for (const Block &block : idle) {
        bytes += block.bytes;
        std::free(block.data);
    }
    return bytes;
}
