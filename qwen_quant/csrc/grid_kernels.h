// The innermost loops of the quantizer, which torch and NumPy would spend on one short operation after another: the
// errors of a group for many scales, and columns rounded one after the other, each one's error spread into the next.
#pragma once

#include <cstdint>

namespace qq {

// How a grid's codes q stand for values; the same as the grids of qwen_quant/grids/base.py.
enum class Rule : int {
    kCentred,  // scale * (q - offset)
    kMinimum,  // scale * q + offset
    kLevels,   // scale * levels[q]
};

// A grid's codes: 0 to max_code, and for kLevels the level of each code and the code for each half step from the first.
struct Codes {
    float max_code;
    const float* levels;
    const float* nearest;
};

// Groups [groups, size] and scales to try for each [groups, candidates]. A code's level is what the scale multiplies:
// q - offset, q, or levels[q].
struct GroupsArgs {
    int64_t groups, size, candidates;
    const float* w;
    const float* importance;
    const float* scale;
    const float* offset;
};

// One problem of the solver: columns of n rows each, a column's rows side by side. A stride is what lies between two columns.
struct RoundColumnsArgs {
    int64_t columns, n;
    float* target;  // what each column would best be decoded to; errors are spread into it
    int64_t ld_target;
    const float* scale;
    const float* offset;
    int64_t ld_scale;
    const float* spread;  // [columns, columns]: row i says how its error is spread into the columns before it
    int64_t spread_row, spread_column;  // from one row, and one column, of it to the next
    const float* w;
    int64_t ld_w;
    uint8_t* codes;
    int64_t ld_codes;
    float* error;  // w minus what is decoded
    int64_t ld_error;
};

// Columns whose errors pull at each other, of one problem: columns of n rows each, a column's rows side by side.
struct DescendArgs {
    int64_t columns, n;
    const float* hessian;  // [columns, columns], symmetric
    int64_t hessian_row;   // from one row to the next
    const float* scale;
    const float* offset;
    int64_t ld_scale;
    float* pull;  // the Hessian's rows times the errors of all columns there are
    int64_t ld_pull;
    uint8_t* codes;
    int64_t ld_codes;
    float* error;  // w minus what is decoded
    int64_t ld_error;
};

struct GridKernels {
    // errors[m, c] = sum of importance * (w - decoded)^2
    void (*group_errors)(Rule, const Codes&, const GroupsArgs&, float* errors);
    // Five times [m, c]: the sums of importance, and of importance times w, level, level^2, and level * w.
    void (*group_sums)(Rule, const Codes&, const GroupsArgs&, float* const* sums);
    void (*round_columns)(Rule, const Codes&, const RoundColumnsArgs&);
    // Gives each column, from the last to the first, the code that is best beside the others' as they are by then.
    void (*descend_columns)(Rule, const Codes&, const DescendArgs&);
};

// The quickest that this CPU can run.
const GridKernels& grid_kernels();

#ifdef QQ_X86
const GridKernels& avx2_grid_kernels();
#endif

}  // namespace qq
