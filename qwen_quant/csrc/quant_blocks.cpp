// The layouts are those of ggml (ggml-common.h and ggml-quants.c describe them).
#include "quant_blocks.h"

#include <cstring>

#include "half.h"
#include "quant_types.h"

namespace qq {

namespace {

// Copies `n` bytes and returns where the next ones go.
uint8_t* put(uint8_t* to, const uint8_t* from, size_t n) {
    std::memcpy(to, from, n);
    return to + n;
}

// ---- stored blocks to wide ones ---------------------------------------------------------------------------------

// The fifth bit of code i is bit i of the four bytes. In the word it is bit i / 4 of byte i % 4, so that one shift
// brings out the bits of four neighbours.
template <size_t Halves>
void widen_q5(const uint8_t* stored, uint8_t* wide) {
    wide = put(wide, stored, 2 * Halves);
    stored += 2 * Halves;
    uint32_t bits;
    std::memcpy(&bits, stored, 4);
    for (int byte = 0; byte < 4; ++byte) {
        uint32_t every_fourth = bits >> byte & 0x11111111u;
        every_fourth = (every_fourth | every_fourth >> 3) & 0x03030303u;
        every_fourth = (every_fourth | every_fourth >> 6) & 0x000f000fu;
        wide[byte] = static_cast<uint8_t>(every_fourth | every_fourth >> 12);
    }
    put(wide + 4, stored + 4, 16);
}

// 16 bytes of scales and minima, 64 of codes, d, dmin
void widen_q2_K(const uint8_t* stored, uint8_t* wide) {
    wide = put(wide, stored + 80, 4);
    put(wide, stored, 80);
}

// 32 bytes of third bits, 64 of codes, 12 of 6-bit scales, d
void widen_q3_K(const uint8_t* stored, uint8_t* wide) {
    const uint8_t* scales = stored + 96;
    wide = put(wide, stored + 108, 2);
    for (int i = 0; i < 16; ++i) {
        const int low = scales[i % 8] >> (i / 8 * 4) & 15;
        const int high = scales[8 + i % 4] >> (i / 4 * 2) & 3;
        *wide++ = static_cast<uint8_t>((low | high << 4) - 32);
    }
    put(wide, stored, 96);
}

// d, dmin, 12 bytes of 6-bit scales and minima, then `Codes` bytes: fifth bits where there are any, and nibbles.
// Bytes 0 ... 3 hold scales 0 ... 3, and in their top two bits those of scales 4 ... 7; bytes 4 ... 7 hold the minima
// likewise; bytes 8 ... 11 the low four bits of scales 4 ... 7, and above them of the minima.
template <size_t Codes>
void widen_six_bit(const uint8_t* stored, uint8_t* wide) {
    const uint8_t* packed = stored + 4;
    wide = put(wide, stored, 4);
    for (int i = 0; i < 4; ++i) {
        const int rest = packed[8 + i];
        wide[i] = packed[i] & 63;
        wide[i + 4] = static_cast<uint8_t>((rest & 15) | packed[i] >> 6 << 4);
        wide[i + 8] = packed[i + 4] & 63;
        wide[i + 12] = static_cast<uint8_t>(rest >> 4 | packed[i + 4] >> 6 << 4);
    }
    put(wide + 16, stored + 16, Codes);
}

// 128 bytes of low four bits, 64 of high two, 16 scales, d
void widen_q6_K(const uint8_t* stored, uint8_t* wide) {
    wide = put(wide, stored + 208, 2);
    wide = put(wide, stored + 192, 16);
    put(wide, stored, 192);
}

// d, 2 bytes of high two bits of scales, 4 of low four, 128 of codes
void widen_iq4_xs(const uint8_t* stored, uint8_t* wide) {
    const int high_bits = load_u16(stored + 2);
    const uint8_t* low = stored + 4;
    wide = put(wide, stored, 2);
    for (int i = 0; i < 8; ++i) {
        const int scale = (low[i / 2] >> (i % 2 * 4) & 15) | (high_bits >> (2 * i) & 3) << 4;
        *wide++ = static_cast<uint8_t>(scale - 32);
    }
    put(wide, stored + 8, 128);
}

// ---- wide blocks to numbers -------------------------------------------------------------------------------------

// `n` codes of `Bits` bits. Runs of `run` codes share as many bytes, the first run in their lowest bits.
template <int Bits>
void read_planes(const uint8_t* p, int n, int run, int8_t* codes) {
    constexpr int kPerByte = 8 / Bits;
    for (int i = 0; i < n; ++i) {
        const int byte = i / (run * kPerByte) * run + i % run;
        codes[i] = static_cast<int8_t>(p[byte] >> (i / run % kPerByte * Bits) & ((1 << Bits) - 1));
    }
}

// Adds the bits above the lowest `Shift`, laid out as read_planes reads them.
template <int Bits, int Shift>
void add_planes(const uint8_t* p, int n, int run, int8_t* codes) {
    int8_t high[kLargestBlock];
    read_planes<Bits>(p, n, run, high);
    for (int i = 0; i < n; ++i) codes[i] = static_cast<int8_t>(codes[i] | high[i] << Shift);
}

void subtract(int offset, int n, int8_t* codes) {
    for (int i = 0; i < n; ++i) codes[i] = static_cast<int8_t>(codes[i] - offset);
}

void to_levels(int n, int8_t* codes) {
    for (int i = 0; i < n; ++i) codes[i] = kIq4Levels[codes[i]];
}

// scale = d * the group's integer; no minimum
void symmetric_scales(const uint8_t* wide, int n_groups, DecodedBlock& out) {
    const float d = load_half(wide);
    for (int i = 0; i < n_groups; ++i) {
        out.scale[i] = d * static_cast<float>(static_cast<int8_t>(wide[2 + i]));
        out.minimum[i] = 0;
    }
}

void single_scale(const uint8_t* wide, bool has_minimum, DecodedBlock& out) {
    out.scale[0] = load_half(wide);
    out.minimum[0] = has_minimum ? load_half(wide + 2) : 0.0f;
}

void decode_q8_0(const uint8_t* wide, DecodedBlock& out) {
    single_scale(wide, false, out);
    std::memcpy(out.codes, wide + 2, 32);
}

template <int Offset, bool HasMinimum>
void decode_q4(const uint8_t* wide, DecodedBlock& out) {
    single_scale(wide, HasMinimum, out);
    read_planes<4>(wide + (HasMinimum ? 4 : 2), 32, 16, out.codes);
    subtract(Offset, 32, out.codes);
}

void decode_iq4_nl(const uint8_t* wide, DecodedBlock& out) {
    decode_q4<0, false>(wide, out);
    to_levels(32, out.codes);
}

template <int Offset, bool HasMinimum>
void decode_q5(const uint8_t* wide, DecodedBlock& out) {
    const uint8_t* bits = wide + (HasMinimum ? 4 : 2);
    single_scale(wide, HasMinimum, out);
    read_planes<4>(bits + 4, 32, 16, out.codes);
    add_planes<1, 4>(bits, 32, 4, out.codes);
    subtract(Offset, 32, out.codes);
}

void decode_q2_K(const uint8_t* wide, DecodedBlock& out) {
    const float d = load_half(wide), dmin = load_half(wide + 2);
    for (int i = 0; i < 16; ++i) {
        out.scale[i] = d * static_cast<float>(wide[4 + i] & 15);
        out.minimum[i] = -(dmin * static_cast<float>(wide[4 + i] >> 4));
    }
    read_planes<2>(wide + 20, 256, 32, out.codes);
}

void decode_q3_K(const uint8_t* wide, DecodedBlock& out) {
    symmetric_scales(wide, 16, out);
    read_planes<2>(wide + 50, 256, 32, out.codes);
    add_planes<1, 2>(wide + 18, 256, 32, out.codes);
    subtract(4, 256, out.codes);
}

void six_bit_scales(const uint8_t* wide, DecodedBlock& out) {
    const float d = load_half(wide), dmin = load_half(wide + 2);
    for (int i = 0; i < 8; ++i) {
        out.scale[i] = d * static_cast<float>(wide[4 + i]);
        out.minimum[i] = -(dmin * static_cast<float>(wide[12 + i]));
    }
}

void decode_q4_K(const uint8_t* wide, DecodedBlock& out) {
    six_bit_scales(wide, out);
    read_planes<4>(wide + 20, 256, 32, out.codes);
}

void decode_q5_K(const uint8_t* wide, DecodedBlock& out) {
    six_bit_scales(wide, out);
    read_planes<4>(wide + 52, 256, 32, out.codes);
    add_planes<1, 4>(wide + 20, 256, 32, out.codes);
}

void decode_q6_K(const uint8_t* wide, DecodedBlock& out) {
    symmetric_scales(wide, 16, out);
    read_planes<4>(wide + 18, 256, 64, out.codes);
    add_planes<2, 4>(wide + 146, 256, 32, out.codes);
    subtract(32, 256, out.codes);
}

void decode_iq4_xs(const uint8_t* wide, DecodedBlock& out) {
    symmetric_scales(wide, 8, out);
    read_planes<4>(wide + 10, 256, 16, out.codes);
    to_levels(256, out.codes);
}

}  // namespace

const BlockFormat* block_format(uint32_t type) {
    static const BlockFormat q4_0{32, 32, 1, 0, 4, nullptr, decode_q4<8, false>};
    static const BlockFormat q4_1{32, 32, 2, 0, 4, nullptr, decode_q4<0, true>};
    static const BlockFormat q5_0{32, 32, 1, 0, 5, widen_q5<1>, decode_q5<16, false>};
    static const BlockFormat q5_1{32, 32, 2, 0, 5, widen_q5<2>, decode_q5<0, true>};
    static const BlockFormat q8_0{32, 32, 1, 0, 8, nullptr, decode_q8_0};
    static const BlockFormat q2_K{256, 16, 2, 16, 16, widen_q2_K, decode_q2_K};
    static const BlockFormat q3_K{256, 16, 1, 16, 24, widen_q3_K, decode_q3_K};
    static const BlockFormat q4_K{256, 32, 2, 16, 32, widen_six_bit<128>, decode_q4_K};
    static const BlockFormat q5_K{256, 32, 2, 16, 40, widen_six_bit<160>, decode_q5_K};
    static const BlockFormat q6_K{256, 16, 1, 16, 48, widen_q6_K, decode_q6_K};
    static const BlockFormat iq4_nl{32, 32, 1, 0, 4, nullptr, decode_iq4_nl};
    static const BlockFormat iq4_xs{256, 32, 1, 8, 32, widen_iq4_xs, decode_iq4_xs};
    switch (type) {
        case kQ4_0: return &q4_0;
        case kQ4_1: return &q4_1;
        case kQ5_0: return &q5_0;
        case kQ5_1: return &q5_1;
        case kQ8_0: return &q8_0;
        case kQ2_K: return &q2_K;
        case kQ3_K: return &q3_K;
        case kQ4_K: return &q4_K;
        case kQ5_K: return &q5_K;
        case kQ6_K: return &q6_K;
        case kIQ4_NL: return &iq4_nl;
        case kIQ4_XS: return &iq4_xs;
        default: return nullptr;
    }
}

void write_weights(const BlockFormat& format, const DecodedBlock& block, float* out) {
    for (int first = 0; first < format.weights; first += format.group) {
        const float scale = block.scale[first / format.group], minimum = block.minimum[first / format.group];
        for (int i = first; i < first + format.group; ++i) {
            out[i] = scale * static_cast<float>(block.codes[i]) + minimum;
        }
    }
}

}  // namespace qq
