#include "threads.h"

#include <algorithm>

#ifdef __linux__
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace qq {

namespace {

// Long enough to bridge the gap between two stages, short enough to leave a busy machine alone.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

int usable_cpus() {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1u, std::thread::hardware_concurrency());
}

ThreadTeam::ThreadTeam(int n_threads) : n_threads_(n_threads) {
    for (int id = 1; id < n_threads; ++id) workers_.emplace_back([this, id] { work(id); });
}

ThreadTeam::~ThreadTeam() {
    stop_.store(true);
    publish(round_, round_.load() + 1);
    for (std::thread& worker : workers_) worker.join();
}

void ThreadTeam::run(const std::function<void(int)>& job) {
    job_ = &job;
    publish(round_, round_.load() + 1);
    job(0);
    barrier();
}

void ThreadTeam::work(int id) {
    for (uint32_t seen = 0;;) {
        wait_while(round_, seen);
        seen = round_.load();
        if (stop_.load()) return;
        (*job_)(id);
        barrier();
    }
}

void ThreadTeam::barrier() {
    if (n_threads_ == 1) return;
    const uint32_t phase = phase_.load();
    if (arrived_.fetch_add(1) + 1 == n_threads_) {
        arrived_.store(0);
        publish(phase_, phase + 1);
    } else {
        wait_while(phase_, phase);
    }
}

void ThreadTeam::wait_while(const std::atomic<uint32_t>& word, uint32_t value) {
    for (int i = 0; i < kSpins; ++i) {
        if (word.load(std::memory_order_acquire) != value) return;
        relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return word.load() != value; });
    sleepers_.fetch_sub(1);
}

// Sequentially consistent on both sides: either we see the sleeper, or it sees the new value before sleeping.
void ThreadTeam::publish(std::atomic<uint32_t>& word, uint32_t value) {
    word.store(value);
    if (sleepers_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
}

bool SharedRanges::take(int id, uint32_t stage, int64_t n, int64_t step, Range& piece) {
    constexpr int64_t kSmallest = 16;  // parts of a part: smaller pieces cost more than they even out
    const int64_t units = (n + step - 1) / step;
    const int size = static_cast<int>(parts_.size());
    for (int i = 0; i < size; ++i) {
        const int owner = (id + i) % size;
        const int64_t begin = units * owner / size, end = units * (owner + 1) / size;
        const int64_t smallest = std::max<int64_t>((end - begin) / kSmallest, 1);
        std::atomic<uint64_t>& word = parts_[static_cast<size_t>(owner)].word;
        for (uint64_t seen = word.load();;) {
            const int32_t ahead = static_cast<int32_t>(static_cast<uint32_t>(seen >> 32) - stage);
            const int64_t at = ahead < 0 ? begin : static_cast<int64_t>(seen & 0xffffffffu);
            if (ahead > 0 || at >= end) break;
            const int64_t next = std::min(at + std::max((end - at) / 2, smallest), end);
            if (!word.compare_exchange_weak(seen, static_cast<uint64_t>(stage) << 32 | static_cast<uint64_t>(next))) {
                continue;
            }
            piece = {at * step, std::min(next * step, n)};
            return true;
        }
    }
    return false;
}

}  // namespace qq
