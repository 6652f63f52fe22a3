// Products of several tokens with packed weights: the weights of a few rows become bytes once for all tokens, in a
// panel that stays in the first-level cache while the tokens pass by.
#pragma once

#include "packed_steps.h"

namespace qq {

namespace {

// What one step of a group of rows is to several tokens: codes and all they are scaled with, ready for products.
template <class W>
struct PanelStep {
    using Sum = std::conditional_t<W::kGroup == kHalfBlock, typename W::Sum::InPanelOfHalves, typename W::Sum::InPanel>;
    static constexpr int kParts = Sum::kParts;  // vectors that a word of codes becomes
    static constexpr int kScales = W::kScaled ? kBlock / W::kGroup : 0;

    LaneInts codes[8][kParts];
    LaneFloats d;
    LaneScales scales[kScales > 0 ? kScales : 1];
    LaneInts offset;  // where it is kScaledOffset
    LaneFloats minima[W::kMinima > 0 ? W::kMinima : 1];

    template <int J>
    QQ_INLINE void bring_out(const uint8_t* w, int c) {
        unrolled<4>([&](auto pair) QQ_LAMBDA_INLINE {
            constexpr int I = decltype(pair)::value;
            LaneInts first, second;
            W::template codes<J, I>(w + W::kWords, c, first, second);
            Sum::split(first, codes[W::first(I)]);
            Sum::split(second, codes[W::second(I)]);
        });
        if constexpr (kTwoTokens<Sum>) {
            for (int i = 0; i < 8; i += 2) Sum::pair_words(codes[i][0], codes[i + 1][0]);
        }
        d = W::half(w, 0);
        if constexpr (W::kScaled) {
            for (int n = 0; n < kScales; ++n) scales[n] = lane_scales(W::template scale<J>(w, c, n));
        }
        if constexpr (kScaledOffset<W>) offset = scaled_offset<W, J>(w, c);
        if constexpr (W::kMinima > 0) {
            for (int i = 0; i < W::kMinima; ++i) minima[i] = W::template minimum<J>(w, c, i);
        }
    }
};

// Some groups of rows and up to kSteps steps, small enough for the first-level cache.
template <class W>
struct Panel {
    static constexpr int G = kGroups;
    static constexpr int kTokens = kPackedTokens;
    static constexpr int64_t kRows = G * kLanes;
    static constexpr int64_t steps_within(size_t bytes) {
        int64_t n = 8;  // of 32 weights: whole blocks of every type
        while (2 * n * G * sizeof(PanelStep<W>) <= bytes) n *= 2;
        return n;
    }
    static constexpr int64_t kSteps = steps_within(28 << 10);
    PanelStep<W> steps[kSteps][G];

    // n_steps steps from b0 on, of the rows from r0 on
    void bring_out(const MatmulArgs& a, int64_t r0, int64_t b0, int64_t n_steps) {
        for (int g = 0; g < G; ++g) {
            const uint8_t* w = a.weights + (r0 + g * kLanes) * a.row_bytes + b0 / (W::kChunks * W::kSteps) * W::kBytes;
            for (int64_t b = 0; b < n_steps; w += W::kBytes) {
                for (int c = 0; c < W::kChunks; ++c, b += W::kSteps) {
                    unrolled<W::kSteps>([&](auto j) QQ_LAMBDA_INLINE {
                        steps[b + j][g].template bring_out<decltype(j)::value>(w, c);
                    });
                }
            }
        }
    }
};

// The scale that the products of word `kWord` of a step wait for
template <int kWord, class W>
QQ_INLINE auto scale_after(const PanelStep<W>& step) {
    if constexpr (W::kScaled) {
        return step.scales[kWord / (W::kGroup / 4)];
    } else {
        return NoScale();
    }
}

// The products of one step of a panel's rows with T tokens, the b-th 32 weights of the row.
template <class W, int G, int T>
struct StepSums {
    using Sum = typename PanelStep<W>::Sum;
    Sum sums[G][T];

    QQ_INLINE void multiply(const PanelStep<W> (&step)[G], const uint8_t* const (&x)[T], const Q8Row& at, int64_t b) {
#pragma GCC unroll 8  // here and below: or the sums would be kept in memory
        for (int t = 0; t < T; ++t) {
            for (int g = 0; g < G; ++g) sums[g][t].begin(start<W>(x[t], at, b, 0));
        }
        unrolled<8>([&](auto word) QQ_LAMBDA_INLINE {
            constexpr int kWord = decltype(word)::value, kDone = kWord + 1, kGroupWords = W::kGroup / 4;
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const auto four = Sum::load(x[t], at, b * kBlock + 4 * kWord);
                for (int g = 0; g < G; ++g) sums[g][t].add(step[g].codes[kWord], four);
            }
            if constexpr (kDone % fold_after<W, Sum>() == 0) {
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    for (int g = 0; g < G; ++g) sums[g][t].fold(scale_after<kWord>(step[g]));
                }
            }
            if constexpr (kStartsWithin<W> && kDone % kGroupWords == 0 && kDone < 8) {
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    for (int g = 0; g < G; ++g) sums[g][t].restart(start<W>(x[t], at, b, kDone / kGroupWords));
                }
            }
        });
    }
    QQ_INLINE LaneFloats total(int g, int t) const { return sums[g][t].total(); }
};

// The same where a sum is of two tokens; of an odd number the last one counts twice.
template <class W, int G, int T>
struct PairedSums {
    using Sum = typename PanelStep<W>::Sum;
    static constexpr int kPairs = (T + 1) / 2;
    Sum sums[G][kPairs];

    QQ_INLINE void multiply(const PanelStep<W> (&step)[G], const uint8_t* const (&x)[T], const Q8Row& at, int64_t b) {
#pragma GCC unroll 8
        for (int p = 0; p < kPairs; ++p) {
            const int32_t first = start<W>(x[2 * p], at, b, 0), second = start<W>(x[other(p)], at, b, 0);
            for (int g = 0; g < G; ++g) sums[g][p].begin(first, second);
        }
        unrolled<4>([&](auto pair) QQ_LAMBDA_INLINE {
            constexpr int kWord = 2 * decltype(pair)::value, kDone = kWord + 2, kGroupWords = W::kGroup / 4;
            const int64_t i = b * kBlock + 4 * kWord;
#pragma GCC unroll 8
            for (int p = 0; p < kPairs; ++p) {
                const LaneInts eight = Sum::load_pair(x[2 * p] + i, x[other(p)] + i);
                for (int g = 0; g < G; ++g) {
                    sums[g][p].add(step[g].codes[kWord][0], step[g].codes[kWord + 1][0], eight);
                }
            }
            if constexpr (kDone % fold_after<W, Sum>() == 0) {
#pragma GCC unroll 8
                for (int p = 0; p < kPairs; ++p) {
                    for (int g = 0; g < G; ++g) sums[g][p].fold(scale_after<kWord>(step[g]));
                }
            }
            if constexpr (kStartsWithin<W> && kDone % kGroupWords == 0 && kDone < 8) {
                constexpr int kNext = kDone / kGroupWords;
#pragma GCC unroll 8
                for (int p = 0; p < kPairs; ++p) {
                    const int32_t first = start<W>(x[2 * p], at, b, kNext), second = start<W>(x[other(p)], at, b, kNext);
                    for (int g = 0; g < G; ++g) sums[g][p].restart(first, second);
                }
            }
        });
    }
    QQ_INLINE LaneFloats total(int g, int t) const { return sums[g][t / 2].total(t % 2); }

private:
    static constexpr int other(int p) { return 2 * p + 1 < T ? 2 * p + 1 : 2 * p; }
};

// The same where a sum takes two words at a time and the scale of their group.
template <class W, int G, int T>
struct SumsOfTwoWords {
    using Sum = typename PanelStep<W>::Sum;
    Sum sums[G][T];

    QQ_INLINE void multiply(const PanelStep<W> (&step)[G], const uint8_t* const (&x)[T], const Q8Row& at, int64_t b) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            for (int g = 0; g < G; ++g) {
                if constexpr (kScaledOffset<W>) {
                    sums[g][t].begin(step[g].offset, four_of_x(x[t] + at.minus_halves + 4 * b));
                } else {
                    sums[g][t].begin();
                }
            }
        }
        unrolled<4>([&](auto pair) QQ_LAMBDA_INLINE {
            constexpr int kWord = 2 * decltype(pair)::value;
            LaneInts first[G], second[G];
            for (int g = 0; g < G; ++g) {
                first[g] = step[g].codes[kWord][0];
                second[g] = step[g].codes[kWord + 1][0];
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const uint8_t* eight = x[t] + b * kBlock + 4 * kWord;
                const LaneInts x0 = four_of_x(eight), x1 = four_of_x(eight + 4);
                for (int g = 0; g < G; ++g) sums[g][t].add(first[g], x0, second[g], x1, scale_after<kWord>(step[g]));
            }
        });
    }
    QQ_INLINE LaneFloats total(int g, int t) const { return sums[g][t].total(); }
};

// The sums of a type in a panel.
template <class W, int G, int T>
constexpr auto panel_sums() {
    using Sum = typename PanelStep<W>::Sum;
    if constexpr (kTwoTokens<Sum>) {
        return PairedSums<W, G, T>();
    } else if constexpr (kTwoWords<Sum>) {
        return SumsOfTwoWords<W, G, T>();
    } else {
        return StepSums<W, G, T>();
    }
}

// One step of a panel's rows with T tokens.
template <class W, int G, int T>
QQ_INLINE void add_panel_step(const PanelStep<W> (&step)[G], const uint8_t* const (&x)[T], const Q8Row& at, int64_t b,
                              LaneFloats (&acc)[G][T]) {
    decltype(panel_sums<W, G, T>()) sums;
    sums.multiply(step, x, at, b);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        const LaneFloats x_scale = lanes_of(load_f32(x[t] + at.scales + 4 * b));
        for (int g = 0; g < G; ++g) {
            acc[g][t] = multiply_add(sums.total(g, t), multiply(step[g].d, x_scale), acc[g][t]);
        }
        for (int i = 0; i < W::kMinima; ++i) {
            const LaneFloats sum = lanes_of(load_f32(x[t] + sum_of_x<W>(at, b, i)));
            for (int g = 0; g < G; ++g) acc[g][t] = multiply_add(step[g].minima[i], sum, acc[g][t]);
        }
    }
}

// Adds the products of a panel to y for T tokens from t0 on.
template <class W, int T>
inline void panel_tile(const Panel<W>& panel, const MatmulArgs& a, int64_t r0, int64_t b0, int64_t n_steps,
                       int64_t t0) {
    constexpr int G = Panel<W>::G;
    const Q8Row at = q8_row(a.k);
    const uint8_t* x[T];
    LaneFloats acc[G][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        x[t] = a.x + (t0 + t) * a.x_row_bytes;
        prefetch(reinterpret_cast<const uint8_t*>(a.y + (t0 + T + t) * a.ldy + r0));  // the next tile's
        for (int g = 0; g < G; ++g) {
            acc[g][t] = b0 == 0 ? lanes_of(0.0f) : load_lanes(a.y + (t0 + t) * a.ldy + r0 + g * kLanes);
        }
    }
    for (int64_t b = 0; b < n_steps; ++b) add_panel_step<W>(panel.steps[b], x, at, b0 + b, acc);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        for (int g = 0; g < G; ++g) store_lanes(a.y + (t0 + t) * a.ldy + r0 + g * kLanes, acc[g][t]);
    }
}

// All tokens from t0 on, T at a time, then what is left in smaller tiles.
template <class W, int T>
inline void panel_tokens(const Panel<W>& panel, const MatmulArgs& a, int64_t r0, int64_t b0, int64_t n_steps,
                         int64_t t0) {
    for (; t0 + T <= a.n_tokens; t0 += T) panel_tile<W, T>(panel, a, r0, b0, n_steps, t0);
    if constexpr (T > 1) panel_tokens<W, T / 2>(panel, a, r0, b0, n_steps, t0);
}

}  // namespace

}  // namespace qq
