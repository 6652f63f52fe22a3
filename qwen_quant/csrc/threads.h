// A fixed team of threads that runs one function together, with barriers inside it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace qq {

class ThreadTeam {
public:
    explicit ThreadTeam(int n_threads);
    ~ThreadTeam();
    ThreadTeam(const ThreadTeam&) = delete;
    ThreadTeam& operator=(const ThreadTeam&) = delete;

    int size() const { return n_threads_; }

    // Calls job(0) here and job(1..n-1) on the workers; returns when all are done. job must not throw.
    void run(const std::function<void(int)>& job);

    // Within a job: waits until every thread of the team has come here.
    void barrier();

private:
    void work(int id);
    void wait_while(const std::atomic<uint32_t>& word, uint32_t value);
    void publish(std::atomic<uint32_t>& word, uint32_t value);

    int n_threads_;
    const std::function<void(int)>* job_ = nullptr;
    std::atomic<uint32_t> round_{0};    // changes when a job starts
    std::atomic<uint32_t> phase_{0};    // changes when a barrier opens
    std::atomic<int> arrived_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

// Threads that this process may use.
int usable_cpus();

// The part [begin, end) of n items that thread `id` of `size` works on, cut at multiples of `step`.
struct Range {
    int64_t begin, end;
};
inline Range share(int64_t n, int id, int size, int64_t step = 1) {
    const int64_t units = (n + step - 1) / step;
    const int64_t begin = units * id / size * step;
    const int64_t end = units * (id + 1) / size * step;
    return {begin < n ? begin : n, end < n ? end : n};
}

// Hands out n items of a stage in pieces: to each thread its own even part first, then what others have left of theirs.
// All threads pass the same stages in the same order; numbers instead of resets let a thread begin a stage while others
// are still busy in the one before.
class SharedRanges {
public:
    explicit SharedRanges(int n_threads) : parts_(static_cast<size_t>(n_threads)) {}

    // The next piece for thread `id`, cut at multiples of `step`; false when nothing is left. Stages count from 1.
    bool take(int id, uint32_t stage, int64_t n, int64_t step, Range& piece);

private:
    struct alignas(64) Part {
        std::atomic<uint64_t> word{0};  // the stage, and in the lower half how far the part has been handed out
    };
    std::vector<Part> parts_;
};

}  // namespace qq
