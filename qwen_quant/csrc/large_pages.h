// Large pages for memory that is read from end to end: fewer faults while filling it, fewer misses in the TLB afterwards.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "buffer.h"

namespace qq {

// Asks for them where the system has them.
inline void advise_large_pages(const Buffer& buffer) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(buffer.data()) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(buffer.data()) + buffer.bytes()) / kPage * kPage;
    if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)buffer;
#endif
}

}  // namespace qq
