// What the machine can do, found by trying: read memory and multiply int8 numbers at most, to compare the engine with,
// and the number of threads that do both fastest.
#pragma once

#include <cstddef>

#include "buffer.h"
#include "threads.h"

namespace qq {

// Reads memory as decoding reads weights: every thread its own part, from end to end.
class MemoryProbe {
public:
    // `bytes` should be several times the last cache; they stay resident as long as the probe lives.
    MemoryProbe(int n_threads, size_t bytes);

    size_t bytes() const { return memory_.bytes(); }
    double read();  // reads all of it once; bytes per second

private:
    Buffer memory_;
    ThreadTeam team_;
};

// Multiplications and additions per second of int8 numbers that are in registers already, by the best instructions of
// this CPU, all threads together.
double int8_rate(int n_threads);

// The instructions that int8_rate uses.
const char* int8_instructions();

// The fewest threads, of up to `most`, that are as fast as any number is: two on one core, or cores that other programs
// keep busy, only make the others wait at barriers. Takes some 10 ms, once in a process.
int fastest_thread_count(int most);

}  // namespace qq
