// How packed blocks of each type become codes in bytes, and scales and minima in lanes, whatever the instruction set
// (lanes.h).
//
// A block is taken in kChunks chunks of kSteps steps of 32 weights; the steps of a chunk share bytes.
// codes<J, I>(words, c, a, b) brings out two of the eight words of codes of step J in chunk c, first(I) and second(I).
// With the step's activations x the step adds up to
//     d * sum over groups of scale<J>(p, c, group) * (codes - kOffset) * x + sum of minimum<J>(p, c, i) * sum of x.
// kGroup says how many codes share a scale (a type whose blocks have a single scale is not kScaled), kMinima how many
// minima a step has: none, one, or one for each half. The codes are multiplied as they are, kOffset is taken off by sums
// of x that are there already.
#pragma once

#include "kernels.h"

namespace qq {

namespace {

// A block as quant_blocks.h lays it out: `Halves` numbers of 16 bits, `Bytes` bytes, `Words` words of each row.
template <int Halves, int Bytes, int Words, int Chunks, int Steps>
struct PackedBlock {
    static constexpr int kBytes = (2 * Halves + Bytes + 4 * Words) * kLanes;
    static constexpr int kWords = (2 * Halves + Bytes) * kLanes;  // where they begin
    static constexpr int kChunks = Chunks, kSteps = Steps;

    static LaneFloats half(const uint8_t* p, int i) { return load_lane_halves(p + 2 * i * kLanes); }
    static LaneInts byte(const uint8_t* p, int i) { return lane_bytes(p + (2 * Halves + i) * kLanes); }
    static LaneInts word(const uint8_t* words, int i) { return load_codes(words + 4 * i * kLanes); }
};

inline LaneFloats times(float a, LaneFloats b) { return multiply(lanes_of(a), b); }

// `Bits` bits from bit `From` of each byte, moved to bit `To`
template <int Bits, int From, int To>
inline LaneInts bits_of(LaneInts x) {
    return mask_bytes(shift<To - From>(x), ((1 << Bits) - 1) << To);
}

// Four bits from bit `From` of each lane's lowest byte
template <int From>
inline LaneInts nibble_of_lane(LaneInts x) {
    return shift<-28>(shift<28 - From>(x));
}

// The words of a pair: neighbours, or 16 codes apart and sharing their bytes.
struct Neighbours {
    static constexpr int first(int i) { return 2 * i; }
    static constexpr int second(int i) { return 2 * i + 1; }
};
struct Apart {
    static constexpr int first(int i) { return i; }
    static constexpr int second(int i) { return i + 4; }
};

struct Unscaled {
    static constexpr bool kScaled = false;
    static constexpr int kGroup = 32;
};
template <int Group>
struct Scaled {
    static constexpr bool kScaled = true;
    static constexpr int kGroup = Group;
};

template <int Offset>
struct NoMinimum {
    static constexpr int kMinima = 0, kOffset = Offset;
};
template <int Count>
struct Minima {
    static constexpr int kMinima = Count, kOffset = 0;
};
constexpr int kSignedOffset = kSignedCodesFlipped ? 128 : 0;

struct PackedQ8_0 : PackedBlock<1, 0, 8, 1, 1>, Neighbours, Unscaled, NoMinimum<kSignedOffset> {
    using Sum = SignedSum;
    template <int J, int I>
    static void codes(const uint8_t* words, int, LaneInts& a, LaneInts& b) {
        a = word(words, 2 * I);
        b = word(words, 2 * I + 1);
    }
};

// Four words of nibbles for each step, from word `First` of the block on
template <class Block, int First>
struct SharedNibbles : Block, Apart {
    template <int J, int I>
    static void codes(const uint8_t* words, int c, LaneInts& a, LaneInts& b) {
        const LaneInts both = Block::word(words, First + 4 * c + I);
        a = bits_of<4, 0, 0>(both);
        b = bits_of<4, 4, 0>(both);
    }
};

struct PackedQ4_0 : SharedNibbles<PackedBlock<1, 0, 4, 1, 1>, 0>, Unscaled, NoMinimum<8> {
    using Sum = UnsignedSum<15>;
};

struct PackedQ4_1 : SharedNibbles<PackedBlock<2, 0, 4, 1, 1>, 0>, Unscaled, Minima<1> {
    using Sum = UnsignedSum<15>;
    template <int J>
    static LaneFloats minimum(const uint8_t* p, int, int) { return half(p, 1); }
};

// Nibbles that name levels
template <class Nibbles>
struct Levels : Nibbles, NoMinimum<kSignedOffset> {
    using Sum = SignedSum;
    template <int J, int I>
    static void codes(const uint8_t* words, int c, LaneInts& a, LaneInts& b) {
        Nibbles::template codes<J, I>(words, c, a, b);
        a = iq4_levels(a);
        b = iq4_levels(b);
    }
};

struct PackedIQ4_NL : Levels<SharedNibbles<PackedBlock<1, 0, 4, 1, 1>, 0>>, Unscaled {};

struct PackedIQ4_XS : Levels<SharedNibbles<PackedBlock<1, 8, 32, 8, 1>, 0>>, Scaled<32> {
    template <int J>
    static LaneInts scale(const uint8_t* p, int c, int) { return byte(p, c); }
};

// The first word holds the fifth bits: those of word i in bit i of each byte.
template <int Halves>
struct PackedQ5 : SharedNibbles<PackedBlock<Halves, 0, 5, 1, 1>, 1>, Unscaled {
    using Nibbles = SharedNibbles<PackedBlock<Halves, 0, 5, 1, 1>, 1>;
    using Sum = UnsignedSum<31>;
    template <int J, int I>
    static void codes(const uint8_t* words, int c, LaneInts& a, LaneInts& b) {
        const LaneInts fifth = Nibbles::word(words, 0);
        Nibbles::template codes<J, I>(words, c, a, b);
        a = either(a, bits_of<1, I, 4>(fifth));
        b = either(b, bits_of<1, I + 4, 4>(fifth));
    }
};

struct PackedQ5_0 : PackedQ5<1>, NoMinimum<16> {};

struct PackedQ5_1 : PackedQ5<2>, Minima<1> {
    template <int J>
    static LaneFloats minimum(const uint8_t* p, int, int) { return half(p, 1); }
};

// Both words of a pair from the same function: code<J>(words, c, w) brings out word w of step J.
template <class W>
struct WordByWord : Neighbours {
    template <int J, int I>
    static void codes(const uint8_t* words, int c, LaneInts& a, LaneInts& b) {
        a = W::template code<J>(words, c, 2 * I);
        b = W::template code<J>(words, c, 2 * I + 1);
    }
};

struct PackedQ2_K : PackedBlock<2, 16, 16, 2, 4>, WordByWord<PackedQ2_K>, Scaled<16>, Minima<2> {
    using Sum = UnsignedSum<3>;
    template <int J>
    static LaneInts code(const uint8_t* words, int c, int w) {
        return bits_of<2, 2 * J, 0>(word(words, 8 * c + w));
    }
    template <int J>
    static LaneInts scale(const uint8_t* p, int c, int group) {
        return nibble_of_lane<0>(byte(p, 8 * c + 2 * J + group));
    }
    template <int J>
    static LaneFloats minimum(const uint8_t* p, int c, int i) {
        return multiply(to_floats(nibble_of_lane<4>(byte(p, 8 * c + 2 * J + i))), times(-1.0f, half(p, 1)));
    }
};

struct PackedQ3_K : PackedBlock<1, 16, 24, 2, 4>, WordByWord<PackedQ3_K>, Scaled<16>, NoMinimum<4> {
    using Sum = UnsignedSum<7>;
    template <int J>
    static LaneInts code(const uint8_t* words, int c, int w) {
        const LaneInts low = word(words, 8 + 8 * c + w), third = shift_right(word(words, w), 4 * c);
        return either(bits_of<2, 2 * J, 0>(low), bits_of<1, J, 2>(third));
    }
    template <int J>
    static LaneInts scale(const uint8_t* p, int c, int group) { return byte(p, 8 * c + 2 * J + group); }
};

// Scales and minima of Q4_K and Q5_K
template <int Words>
struct SixBitMinima : PackedBlock<2, 16, Words, 4, 2>, Scaled<32>, Minima<1> {
    using Block = PackedBlock<2, 16, Words, 4, 2>;
    template <int J>
    static LaneInts scale(const uint8_t* p, int c, int) { return Block::byte(p, 2 * c + J); }
    template <int J>
    static LaneFloats minimum(const uint8_t* p, int c, int) {
        return multiply(to_floats(Block::byte(p, 8 + 2 * c + J)), times(-1.0f, Block::half(p, 1)));
    }
};

struct PackedQ4_K : SixBitMinima<32>, WordByWord<PackedQ4_K> {
    using Sum = UnsignedSum<15>;
    template <int J>
    static LaneInts code(const uint8_t* words, int c, int w) {
        return bits_of<4, 4 * J, 0>(word(words, 8 * c + w));
    }
};

struct PackedQ5_K : SixBitMinima<40>, WordByWord<PackedQ5_K> {
    using Sum = UnsignedSum<31>;
    template <int J>
    static LaneInts code(const uint8_t* words, int c, int w) {
        const LaneInts low = word(words, 8 + 8 * c + w), fifth = shift_right(word(words, w), 2 * c);
        return either(bits_of<4, 4 * J, 0>(low), bits_of<1, J, 4>(fifth));
    }
};

struct PackedQ6_K : PackedBlock<1, 16, 48, 2, 4>, WordByWord<PackedQ6_K>, Scaled<16>, NoMinimum<32> {
    using Sum = UnsignedSum<63>;
    template <int J>
    static LaneInts code(const uint8_t* words, int c, int w) {
        const LaneInts low = word(words, 16 * c + J % 2 * 8 + w), high = word(words, 32 + 8 * c + w);
        return either(bits_of<4, J / 2 * 4, 0>(low), bits_of<2, 2 * J, 4>(high));
    }
    template <int J>
    static LaneInts scale(const uint8_t* p, int c, int group) { return byte(p, 8 * c + 2 * J + group); }
};

}  // namespace

}  // namespace qq
