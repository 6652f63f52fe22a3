// AVX512-BF16: BF16 matrices times activations that are rounded to BF16, two products to a lane, which are added up in FP32;
// everything else as with AVX-512 VNNI. F16 has more digits than BF16, so F16 matrices stay floats.
#include "x86_floats.h"

namespace qq {

namespace {

struct Bf16Pairs {
    using Stored = LoadBF16;
    using Weights = __m512bh;
    using Values = __m512bh;
    static constexpr int kStep = 2 * kLanes, kRows = 8, kTokens = 3;  // rows share what rounding a token takes
    static Weights weights(const uint8_t* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
    static Values values(const uint8_t* x) {
        const float* floats = reinterpret_cast<const float*>(x);
        return _mm512_cvtne2ps_pbh(_mm512_loadu_ps(floats + kLanes), _mm512_loadu_ps(floats));
    }
    static float value(const uint8_t* x) { return bf16_to_float(float_to_bf16(LoadF32::load1(x))); }
    static LaneFloats add(Weights w, Values x, LaneFloats sum) { return _mm512_dpbf16_ps(sum, w, x); }
};

Kernels make_table() {
    Kernels k = *avx512vnni_kernels();
    k.isa = "avx512bf16";
    k.types[kBF16].matmul = matmul_floats<Bf16Pairs>;
    return k;
}

}  // namespace

const Kernels* avx512bf16_kernels() {
    static const Kernels table = make_table();
    return &table;
}

}  // namespace qq
