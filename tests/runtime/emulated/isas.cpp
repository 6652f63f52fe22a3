// The emulated instruction sets in place of those that this CPU can run (cpu.cpp).
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace qq {

#ifdef QQ_WITHOUT_VNNI  // which takes long to compile
const Kernels* avx512vnni_kernels() { return scalar_kernels(); }
#endif

const char* const* available_isas() {
    static const char* const names[] = {"avx512vnni", "avx512bf16", nullptr};
    return names;
}

const Kernels* find_kernels(const char* isa) {
    for (const Kernels* kernels : {avx512vnni_kernels(), avx512bf16_kernels()}) {
        if (std::strcmp(kernels->isa, isa) == 0) return kernels;
    }
    return nullptr;
}

}  // namespace qq
