// What attention keeps of the rows (token, query head) that share a key/value head.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kv_block.h"

namespace qq {

// The online softmax of some rows: acc / sum is what they take from the values so far.
struct AttentionSums {
    float *acc, *top, *sum;  // [rows, dim], [rows], [rows]

    static int64_t floats(int64_t rows, int64_t dim) { return (rows * (dim + 2) + 15) / 16 * 16; }  // whole cache lines
    static AttentionSums at(float* begin, int64_t rows, int64_t dim) {
        return {begin, begin + rows * dim, begin + rows * (dim + 1)};
    }
    void clear(int64_t rows, int64_t dim) const {
        std::fill(acc, acc + rows * dim, 0.0f);
        std::fill(top, top + rows, -std::numeric_limits<float>::infinity());
        std::fill(sum, sum + rows, 0.0f);
    }
    void merge(const AttentionSums& next, int64_t rows, int64_t dim) const {
        for (int64_t row = 0; row < rows; ++row) {
            const float largest = std::max(top[row], next.top[row]);
            const float own = std::exp(top[row] - largest), other = std::exp(next.top[row] - largest);
            float* x = acc + row * dim;
            const float* y = next.acc + row * dim;
            for (int64_t i = 0; i < dim; ++i) x[i] = x[i] * own + y[i] * other;
            sum[row] = sum[row] * own + next.sum[row] * other;
            top[row] = largest;
        }
    }
};

// What one thread needs for the rows of a group, all within its scratch.
struct AttentionRows {
    int64_t n;
    float *q, *scores, *rescale;                    // [rows, dim], [rows, kKvBlock], [rows]
    AttentionSums sums, chunk;                      // so far, and of one chunk alone
    float *turned, *centre_a, *centre_b;            // [rows, dim], and [rows, dim / 2] twice: with quantized keys
    float* centre;                                  // [dim]
    KvQueries codes;

    static size_t bytes(int64_t rows, int64_t dim) {
        const int64_t floats = rows * (3 * dim + kKvBlock + 1 + 2 * (dim / kKvGroup)) + dim;
        return static_cast<size_t>(floats + 2 * AttentionSums::floats(rows, dim)) * sizeof(float) +
               static_cast<size_t>(rows * dim) * sizeof(int16_t);
    }

    AttentionRows(float* scratch, int64_t rows, int64_t dim) : n(rows) {
        const auto take = [&](int64_t n) {
            float* part = scratch;
            scratch += n;
            return part;
        };
        q = take(rows * dim);
        sums = AttentionSums::at(take(AttentionSums::floats(rows, dim)), rows, dim);
        chunk = AttentionSums::at(take(AttentionSums::floats(rows, dim)), rows, dim);
        turned = take(rows * dim);
        scores = take(rows * kKvBlock);
        centre_a = take(rows * dim / 2);
        centre_b = take(rows * dim / 2);
        centre = take(dim);
        rescale = take(rows);
        codes.scales = take(rows * (dim / kKvGroup));
        codes.offsets = take(rows * (dim / kKvGroup));
        codes.codes = reinterpret_cast<uint8_t*>(scratch);
    }
};

}  // namespace qq
