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

}  // namespace qq
