#include "probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#ifdef QQ_X86
#include <immintrin.h>
#endif

#include "large_pages.h"

namespace qq {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr size_t kLine = 64;

// Keeps the compiler from leaving out what nobody looks at.
std::atomic<uint64_t> sink{0};

// Four places at once keep more reads under way than one does.
void read_lines(const uint8_t* begin, const uint8_t* end) {
    constexpr int kPlaces = 4, kWords = kLine / sizeof(uint64_t);
    constexpr size_t kAhead = 1024;  // bytes asked for early
    const size_t part = static_cast<size_t>(end - begin) / kLine / kPlaces * kLine;
    uint64_t sums[kWords] = {};
    for (size_t at = 0; at < part; at += kLine) {
#pragma GCC unroll 4
        for (int place = 0; place < kPlaces; ++place) {
            const uint8_t* line = begin + static_cast<size_t>(place) * part + at;
            __builtin_prefetch(line + kAhead);
            uint64_t words[kWords];
            std::memcpy(words, line, sizeof words);
            for (int i = 0; i < kWords; ++i) sums[i] += words[i];
        }
    }
    for (const uint64_t sum : sums) sink.fetch_add(sum, std::memory_order_relaxed);
}

// Ways to multiply: each function does `n` rounds of kSums independent products of whole registers.
constexpr int64_t kSums = 12;  // enough to hide the latency of one sum

struct Int8Method {
    const char* instructions;
    int64_t bytes;  // in a register
    void (*rounds)(int64_t n);
};

void rounds_plain(int64_t n) {
    int8_t w[16], x[16];
    std::memset(w, 3, sizeof w);
    std::memset(x, 5, sizeof x);
    int32_t total = 0;
    for (int64_t i = 0; i < n * kSums; ++i) {
        asm volatile("" : "+m"(w), "+m"(x));
        for (int j = 0; j < 16; ++j) total += static_cast<int16_t>(w[j]) * x[j];
    }
    sink.fetch_add(static_cast<uint64_t>(total), std::memory_order_relaxed);
}

#ifdef QQ_X86
// These functions are compiled for their instructions wherever they stand; best_method() chooses at run time. The
// empty asm hides from the compiler that all rounds are alike.
__attribute__((target("avx512f,avx512vnni"))) void rounds_vnni_zmm(int64_t n) {
    const __m512i w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(5);
    __m512i sums[kSums];
    for (__m512i& sum : sums) sum = _mm512_setzero_si512();
    for (; n > 0; --n) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], w, x);
    }
    for (__m512i& sum : sums) asm volatile("" : "+v"(sum));
}

__attribute__((target("avx2,avxvnni"))) void rounds_vnni_ymm(int64_t n) {
    const __m256i w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(5);
    __m256i sums[kSums];
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
    for (; n > 0; --n) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) sums[i] = _mm256_dpbusd_avx_epi32(sums[i], w, x);
    }
    for (__m256i& sum : sums) asm volatile("" : "+x"(sum));
}

__attribute__((target("avx2"))) void rounds_avx2(int64_t n) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i w = _mm256_set1_epi8(3);
    __m256i sums[kSums];
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
    for (; n > 0; --n) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) {
            asm volatile("" : "+x"(w));
            const __m256i pairs = _mm256_maddubs_epi16(w, w);
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
        }
    }
    for (__m256i& sum : sums) asm volatile("" : "+x"(sum));
}
#endif

Int8Method best_method() {
#ifdef QQ_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni")) {
        return {"vpdpbusd zmm", 64, rounds_vnni_zmm};
    }
    if (__builtin_cpu_supports("avxvnni")) return {"vpdpbusd ymm", 32, rounds_vnni_ymm};
    if (__builtin_cpu_supports("avx2")) return {"vpmaddubsw, vpmaddwd ymm", 32, rounds_avx2};
#endif
    return {"plain C++", 16, rounds_plain};
}

// Of a token in a small model: some reading and some multiplying, divided among the threads, in stages.
struct TrialStep {
    static constexpr int64_t kStages = 8;
    static constexpr int64_t kLines = int64_t{8 << 20} / kLine;
    static constexpr int64_t kRounds = 160000;
    Buffer memory{static_cast<size_t>(kLines) * kLine};
    Int8Method method = best_method();

    TrialStep() {
        advise_large_pages(memory);
        std::memset(memory.data(), 1, memory.bytes());
    }

    // Seconds, at best: what else the machine does only makes it longer.
    double run(int n_threads, int tries) const {
        ThreadTeam team(n_threads);
        double best = 1e9;
        for (int i = 0; i < tries; ++i) {
            const Clock::time_point start = Clock::now();
            team.run([&](int id) { work(team, id); });
            best = std::min(best, seconds_since(start));
        }
        return best;
    }

    void work(ThreadTeam& team, int id) const {
        for (int64_t stage = 0; stage < kStages; ++stage) {
            const int64_t first = kLines / kStages * stage;
            const Range lines = share(kLines / kStages, id, team.size());
            read_lines(memory.data() + (first + lines.begin) * kLine, memory.data() + (first + lines.end) * kLine);
            const Range rounds = share(kRounds / kStages, id, team.size());
            method.rounds(rounds.end - rounds.begin);
            team.barrier();
        }
    }
};

}  // namespace

MemoryProbe::MemoryProbe(int n_threads, size_t bytes) : memory_((bytes + kLine - 1) / kLine * kLine), team_(n_threads) {
    advise_large_pages(memory_);
    team_.run([&](int id) {
        const Range lines = share(static_cast<int64_t>(memory_.bytes() / kLine), id, team_.size());
        std::memset(memory_.data() + lines.begin * kLine, 1, static_cast<size_t>(lines.end - lines.begin) * kLine);
    });
}

double MemoryProbe::read() {
    const Clock::time_point start = Clock::now();
    team_.run([&](int id) {
        const Range lines = share(static_cast<int64_t>(memory_.bytes() / kLine), id, team_.size());
        read_lines(memory_.data() + lines.begin * kLine, memory_.data() + lines.end * kLine);
    });
    return static_cast<double>(memory_.bytes()) / seconds_since(start);
}

double int8_rate(int n_threads) {
    constexpr double kSeconds = 0.02;
    constexpr int64_t kRounds = 20000;
    const Int8Method method = best_method();
    ThreadTeam team(n_threads);
    std::atomic<int64_t> rounds{0};
    method.rounds(kRounds);  // wakes the vector units up
    const Clock::time_point start = Clock::now();
    team.run([&](int) {
        int64_t done = 0;
        for (; seconds_since(start) < kSeconds; done += kRounds) method.rounds(kRounds);
        rounds.fetch_add(done);
    });
    return static_cast<double>(rounds.load() * kSums * method.bytes * 2) / seconds_since(start);
}

int fastest_thread_count(int most) {
    static std::mutex mutex;
    static std::map<int, int> known;
    const std::lock_guard<std::mutex> lock(mutex);
    if (most <= 1) return 1;
    if (known.count(most)) return known[most];
    constexpr double kAsFast = 1.05, kHopeless = 1.5;
    constexpr int kTries = 3;
    const TrialStep step;
    std::vector<std::pair<int, double>> tried;
    double best = step.run(most, 1);  // once more than the others: clocks and caches have to get going
    for (const int n : {most, most * 3 / 4, most / 2, most * 3 / 8, most / 4, most * 3 / 16, most / 8, 1}) {
        if (n < 1 || (!tried.empty() && n >= tried.back().first)) continue;
        tried.emplace_back(n, step.run(n, kTries));
        best = std::min(best, tried.back().second);
        if (tried.back().second > kHopeless * best) break;
    }
    int chosen = most;
    for (const auto& [n, seconds] : tried) {
        if (seconds <= kAsFast * best) chosen = n;
    }
    return known[most] = chosen;
}

const char* int8_instructions() { return best_method().instructions; }

}  // namespace qq
