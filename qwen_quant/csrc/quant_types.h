// Tensor types of GGUF: ids, names and block sizes. A block stores `block` weights in `bytes` bytes; how their bits lie
// in it is in quant_blocks.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qq {

// d and m are FP16; s and m of a group within a block are small integers.
enum GgmlType : uint32_t {
    kF32 = 0,
    kF16 = 1,
    kQ4_0 = 2,     // d * (q - 8)
    kQ4_1 = 3,     // d * q + m
    kQ5_0 = 6,     // d * (q - 16)
    kQ5_1 = 7,     // d * q + m
    kQ8_0 = 8,     // d * q
    kQ2_K = 10,    // d * s * q - dmin * m, in groups of 16
    kQ3_K = 11,    // d * s * (q - 4), in groups of 16
    kQ4_K = 12,    // d * s * q - dmin * m, in groups of 32
    kQ5_K = 13,    // d * s * q - dmin * m, in groups of 32
    kQ6_K = 14,    // d * s * (q - 32), in groups of 16
    kIQ4_NL = 20,  // d * level[q]
    kIQ4_XS = 23,  // d * s * level[q], in groups of 32
    kBF16 = 30,
};

constexpr uint32_t kTypeCount = 40;
constexpr int64_t kBlock = 32;  // activations under one int8 scale; every block of weights is a multiple of it

// The levels that a 4-bit code of IQ4_NL and IQ4_XS names.
constexpr int8_t kIq4Levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct TypeInfo {
    const char* name;
    uint32_t block;
    uint32_t bytes;
};

// nullptr for an id that GGUF does not define. Types that the engine cannot multiply are listed too,
// so that a file holding them can still be checked and reported by name.
inline const TypeInfo* type_info(uint32_t type) {
    static const TypeInfo table[kTypeCount] = {
        {"F32", 1, 4},        {"F16", 1, 2},        {"Q4_0", 32, 18},     {"Q4_1", 32, 20},
        {nullptr, 0, 0},      {nullptr, 0, 0},      {"Q5_0", 32, 22},     {"Q5_1", 32, 24},
        {"Q8_0", 32, 34},     {"Q8_1", 32, 40},     {"Q2_K", 256, 84},    {"Q3_K", 256, 110},
        {"Q4_K", 256, 144},   {"Q5_K", 256, 176},   {"Q6_K", 256, 210},   {"Q8_K", 256, 292},
        {"IQ2_XXS", 256, 66}, {"IQ2_XS", 256, 74},  {"IQ3_XXS", 256, 98}, {"IQ1_S", 256, 50},
        {"IQ4_NL", 32, 18},   {"IQ3_S", 256, 110},  {"IQ2_S", 256, 82},   {"IQ4_XS", 256, 136},
        {"I8", 1, 1},         {"I16", 1, 2},        {"I32", 1, 4},        {"I64", 1, 8},
        {"F64", 1, 8},        {"IQ1_M", 256, 56},   {"BF16", 1, 2},       {nullptr, 0, 0},
        {nullptr, 0, 0},      {nullptr, 0, 0},      {"TQ1_0", 256, 54},   {"TQ2_0", 256, 66},
        {nullptr, 0, 0},      {nullptr, 0, 0},      {nullptr, 0, 0},      {"MXFP4", 32, 17},
    };
    return type < kTypeCount && table[type].name ? &table[type] : nullptr;
}

}  // namespace qq
