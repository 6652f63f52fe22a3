// Chooses the kernels at run time.
#include <cstring>

#if defined(QQ_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(QQ_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "kernels.h"

namespace qq {

namespace {

constexpr int kMaxIsas = 4;

#ifdef QQ_NEON
bool has_dot_products() {
#ifdef __linux__
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return true;  // every 64-bit Arm that Apple built into a computer
#endif
}

bool has_int8_matrices() {
#if defined(__linux__)
    constexpr unsigned long kI8mm = 1ul << 13;  // HWCAP2_I8MM, which older headers lack
    return (getauxval(AT_HWCAP2) & kI8mm) != 0;
#elif defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, nullptr, 0) == 0 && found != 0;
#else
    return false;
#endif
}
#endif

struct Available {
    const Kernels* kernels[kMaxIsas] = {};
    const char* names[kMaxIsas + 1] = {};
    int count = 0;

    void add(const Kernels* k) {
        kernels[count] = k;
        names[count++] = k->isa;
    }

    Available() {
        add(scalar_kernels());
#ifdef QQ_X86
        __builtin_cpu_init();
        const bool avx2 =
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        if (avx2) add(avx2_kernels());
        if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vnni")) {
            add(avx512vnni_kernels());
            if (__builtin_cpu_supports("avx512bf16")) add(avx512bf16_kernels());
        }
#endif
#ifdef QQ_NEON
        if (has_dot_products()) add(neon_kernels());
        if (has_dot_products() && has_int8_matrices()) add(neon_i8mm_kernels());
#endif
    }
};

const Available& available() {
    static const Available list;
    return list;
}

}  // namespace

const Kernels* find_kernels(const char* isa) {
    const Available& list = available();
    if (std::strcmp(isa, "auto") == 0) return list.kernels[list.count - 1];
    for (int i = 0; i < list.count; ++i) {
        if (std::strcmp(isa, list.names[i]) == 0) return list.kernels[i];
    }
    return nullptr;
}

const char* const* available_isas() { return available().names; }

}  // namespace qq
