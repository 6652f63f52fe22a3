// The loops of grid_kernels.h, included by one file per instruction set; compilers vectorise them as they are.
#pragma once

#include <algorithm>

#include "grid_kernels.h"

namespace qq {

namespace {

constexpr int64_t kRowsAtOnce = 256;  // the targets of 32 columns then stay in the first-level cache

// Adding it rounds a float below 2^22 in magnitude to an integer, ties to even, as torch.round does.
constexpr float kToInteger = 12582912.0f;

inline float nearest_code(float position, float max_code) {
    const float inside = std::min(max_code, std::max(0.0f, position));  // 0 for a NaN
    return (inside + kToInteger) - kToInteger;
}

struct Centred {
    explicit Centred(const Codes& a) : max_code(a.max_code) {}
    float code(float w, float scale, float offset) const { return nearest_code(w / scale + offset, max_code); }
    float level(float code, float offset) const { return code - offset; }
    float value(float code, float scale, float offset) const { return scale * level(code, offset); }
    float max_code;
};

struct Minimum {
    explicit Minimum(const Codes& a) : max_code(a.max_code) {}
    float code(float w, float scale, float offset) const { return nearest_code((w - offset) / scale, max_code); }
    float level(float code, float) const { return code; }
    float value(float code, float scale, float offset) const { return scale * code + offset; }
    float max_code;
};

struct Levels {
    explicit Levels(const Codes& a)
        : levels(a.levels), nearest(a.nearest), low(a.levels[0]), high(a.levels[static_cast<int>(a.max_code)]) {}
    float code(float w, float scale, float) const {
        const float level = scale == 0.0f ? 0.0f : w / scale;
        return nearest[static_cast<int>((std::min(high, std::max(low, level)) - low) * 2.0f)];
    }
    float level(float code, float) const { return levels[static_cast<int>(code)]; }
    float value(float code, float scale, float) const { return scale * level(code, 0.0f); }
    const float* levels;
    const float* nearest;
    float low, high;
};

template <class Grid>
void round_column(const Grid& grid, const RoundColumnsArgs& a, int64_t column, int64_t begin, int64_t count) {
    const float* target = a.target + column * a.ld_target + begin;
    float* error = a.error + column * a.ld_error + begin;
    uint8_t* codes = a.codes + column * a.ld_codes + begin;
    const float* w = a.w + column * a.ld_w + begin;
    const float* scale = a.scale + column * a.ld_scale + begin;
    const float* offset = a.offset + column * a.ld_scale + begin;
    for (int64_t i = 0; i < count; ++i) {
        const float code = grid.code(target[i], scale[i], offset[i]);
        const float value = grid.value(code, scale[i], offset[i]);
        codes[i] = static_cast<uint8_t>(static_cast<int>(code));
        error[i] = w[i] - value;
    }
}

template <class Grid>
void round_columns_on(const Grid& grid, const RoundColumnsArgs& a) {
    for (int64_t begin = 0; begin < a.n; begin += kRowsAtOnce) {
        const int64_t count = std::min(kRowsAtOnce, a.n - begin);
        for (int64_t column = a.columns - 1; column >= 0; --column) {
            round_column(grid, a, column, begin, count);
            const float* error = a.error + column * a.ld_error + begin;
            for (int64_t before = 0; before < column; ++before) {
                const float share = a.spread[column * a.spread_row + before * a.spread_column];
                float* target = a.target + before * a.ld_target + begin;
                for (int64_t i = 0; i < count; ++i) target[i] += share * error[i];
            }
        }
    }
}

constexpr int64_t kMoved = 16;  // columns whose changes are kept until they are spread into the columns around them

// The best codes of some rows of one column; `moved` is how far their values fall.
template <class Grid>
void descend_column(const Grid& grid, const DescendArgs& a, int64_t column, int64_t begin, int64_t count, float* moved) {
    const float inverse = 1.0f / a.hessian[column * a.hessian_row + column];
    const float* pull = a.pull + column * a.ld_pull + begin;
    float* error = a.error + column * a.ld_error + begin;
    uint8_t* codes = a.codes + column * a.ld_codes + begin;
    const float* scale = a.scale + column * a.ld_scale + begin;
    const float* offset = a.offset + column * a.ld_scale + begin;
    for (int64_t i = 0; i < count; ++i) {
        const float value = grid.value(static_cast<float>(codes[i]), scale[i], offset[i]);
        const float code = grid.code(value + pull[i] * inverse, scale[i], offset[i]);
        moved[i] = value - grid.value(code, scale[i], offset[i]);
        codes[i] = static_cast<uint8_t>(static_cast<int>(code));
        error[i] += moved[i];
    }
}

// Adds to the pulls of column `to` what the moves of columns `from` to `from + N` cause.
template <int64_t N>
void pull_at(const DescendArgs& a, int64_t to, int64_t from, int64_t begin, int64_t count, const float* moved) {
    float share[N];
    for (int64_t j = 0; j < N; ++j) share[j] = a.hessian[to * a.hessian_row + from + j];
    float* pull = a.pull + to * a.ld_pull + begin;
    for (int64_t i = 0; i < count; ++i) {
        float sum = pull[i];
        for (int64_t j = 0; j < N; ++j) sum += share[j] * moved[j * kRowsAtOnce + i];
        pull[i] = sum;
    }
}

template <class Grid>
void descend_columns_on(const Grid& grid, const DescendArgs& a) {
    float moved[kMoved * kRowsAtOnce];
    for (int64_t begin = 0; begin < a.n; begin += kRowsAtOnce) {
        const int64_t count = std::min(kRowsAtOnce, a.n - begin);
        for (int64_t stop = a.columns; stop > 0; stop -= kMoved) {
            const int64_t start = std::max<int64_t>(0, stop - kMoved);
            for (int64_t column = stop - 1; column >= start; --column) {
                float* mine = moved + (column - start) * kRowsAtOnce;
                descend_column(grid, a, column, begin, count, mine);
                for (int64_t to = start; to < stop; ++to) pull_at<1>(a, to, column, begin, count, mine);
            }
            for (int64_t to = 0; to < a.columns; ++to) {
                if (to >= start && to < stop) continue;
                int64_t from = start;
                for (; from + 4 <= stop; from += 4) {
                    pull_at<4>(a, to, from, begin, count, moved + (from - start) * kRowsAtOnce);
                }
                for (; from < stop; ++from) pull_at<1>(a, to, from, begin, count, moved + (from - start) * kRowsAtOnce);
            }
        }
    }
}

// The sums of N terms over groups for each of their candidates, `terms(w, importance, code, scale, offset, out)`.
// Eight partial sums in turn, whatever the instruction set: the result is the same on every machine.
template <int N, class Grid, class Terms>
void sum_groups(const Grid& grid, const GroupsArgs& a, const Terms& terms, float* const* sums) {
    constexpr int kLanes = 8;
    for (int64_t m = 0; m < a.groups; ++m) {
        const float* w = a.w + m * a.size;
        const float* importance = a.importance + m * a.size;
        for (int64_t c = m * a.candidates; c < (m + 1) * a.candidates; ++c) {
            const float scale = a.scale[c], offset = a.offset[c];
            float partial[N][kLanes] = {};
            int64_t i = 0;
            for (; i + kLanes <= a.size; i += kLanes) {
                float found[N][kLanes];
                for (int l = 0; l < kLanes; ++l) {
                    float term[N];
                    terms(w[i + l], importance[i + l], grid.code(w[i + l], scale, offset), scale, offset, term);
                    for (int t = 0; t < N; ++t) found[t][l] = term[t];
                }
                for (int t = 0; t < N; ++t) {
                    for (int l = 0; l < kLanes; ++l) partial[t][l] += found[t][l];
                }
            }
            for (; i < a.size; ++i) {
                float term[N];
                terms(w[i], importance[i], grid.code(w[i], scale, offset), scale, offset, term);
                for (int t = 0; t < N; ++t) partial[t][0] += term[t];
            }
            for (int t = 0; t < N; ++t) {
                const float* p = partial[t];
                sums[t][c] = ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
            }
        }
    }
}

template <class Grid>
void group_errors_on(const Grid& grid, const GroupsArgs& a, float* errors) {
    const auto terms = [&grid](float w, float importance, float code, float scale, float offset, float* out) {
        const float gap = w - grid.value(code, scale, offset);
        out[0] = importance * gap * gap;
    };
    sum_groups<1>(grid, a, terms, &errors);
}

template <class Grid>
void group_sums_on(const Grid& grid, const GroupsArgs& a, float* const* sums) {
    const auto terms = [&grid](float w, float importance, float code, float, float offset, float* out) {
        const float level = grid.level(code, offset);
        out[0] = importance;
        out[1] = importance * w;
        out[2] = importance * level;
        out[3] = out[2] * level;
        out[4] = out[2] * w;
    };
    sum_groups<5>(grid, a, terms, sums);
}

// Calls `on` with the formula of `rule`.
template <class On>
void with_rule(Rule rule, const Codes& codes, const On& on) {
    switch (rule) {
        case Rule::kCentred: return on(Centred(codes));
        case Rule::kMinimum: return on(Minimum(codes));
        case Rule::kLevels: return on(Levels(codes));
    }
}

void group_errors(Rule rule, const Codes& codes, const GroupsArgs& a, float* errors) {
    with_rule(rule, codes, [&](const auto& grid) { group_errors_on(grid, a, errors); });
}

void group_sums(Rule rule, const Codes& codes, const GroupsArgs& a, float* const* sums) {
    with_rule(rule, codes, [&](const auto& grid) { group_sums_on(grid, a, sums); });
}

void round_columns(Rule rule, const Codes& codes, const RoundColumnsArgs& a) {
    with_rule(rule, codes, [&](const auto& grid) { round_columns_on(grid, a); });
}

void descend_columns(Rule rule, const Codes& codes, const DescendArgs& a) {
    with_rule(rule, codes, [&](const auto& grid) { descend_columns_on(grid, a); });
}

constexpr GridKernels kTable = {group_errors, group_sums, round_columns, descend_columns};

}  // namespace

}  // namespace qq
