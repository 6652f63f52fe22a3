#include "kv_weights.h"

#include <algorithm>
#include <cmath>

namespace qq {

namespace {

using Squares = std::vector<double>;  // [heads, head_dim]

// Calls visit(row, values [cols]) for each row of a matrix as it is stored.
template <class Visit>
void for_each_row(const Matrix& w, const Kernels& kernels, Visit visit) {
    std::vector<float> values(static_cast<size_t>(w.cols));
    for (int64_t row = 0; row < w.rows; ++row) {
        kernels.types[w.type].dequantize(w.data + row * w.row_bytes, w.cols, values.data());
        visit(row, values);
    }
}

// Of W x, where x has independent channels of mean square 1 times `norm`.
Squares mean_squares(const Matrix& w, const std::vector<float>& norm, const Kernels& kernels) {
    Squares found(static_cast<size_t>(w.rows));
    for_each_row(w, kernels, [&](int64_t row, const std::vector<float>& values) {
        float sums[8] = {};
        for (size_t i = 0; i < values.size(); ++i) {
            const float product = values[i] * norm[i];
            sums[i % 8] += product * product;
        }
        for (const float sum : sums) found[row] += sum;
    });
    return found;
}

double mean(const double* x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    return sum / static_cast<double>(n);
}

// After the Q/K norm, which leaves heads of mean square 1 times its weights.
void normalize(Squares& x, const std::vector<float>& norm) {
    const int64_t dim = static_cast<int64_t>(norm.size());
    if (norm.empty()) return;
    for (auto head = x.begin(); head != x.end(); head += dim) {
        const double size = mean(&*head, dim);
        for (int64_t i = 0; i < dim; ++i) head[i] *= static_cast<double>(norm[i]) * norm[i] / size;
    }
}

// Means of the query heads that share keys.
Squares grouped(const Squares& x, const ModelConfig& c) {
    const int64_t per_kv = c.n_heads / c.n_kv_heads;
    Squares means(static_cast<size_t>(c.n_kv_heads * c.head_dim));
    for (int64_t head = 0; head < c.n_heads; ++head) {
        for (int64_t i = 0; i < c.head_dim; ++i) {
            means[head / per_kv * c.head_dim + i] += x[head * c.head_dim + i] / static_cast<double>(per_kv);
        }
    }
    return means;
}

// Both channels that RoPE turns into one another get their mean.
void mean_of_pairs(Squares& x, int64_t dim) {
    for (auto head = x.begin(); head != x.end(); head += dim) {
        for (int64_t i = 0; i < dim / 2; ++i) head[i] = head[i + dim / 2] = (head[i] + head[i + dim / 2]) / 2;
    }
}

std::vector<float> balance(const Squares& seen, const Squares& stored, int64_t dim) {
    std::vector<float> factors(seen.size());
    for (size_t head = 0; head < seen.size(); head += static_cast<size_t>(dim)) {
        const double seen_floor = 1e-6 * std::max(mean(&seen[head], dim), 1e-20);
        const double floor = 1e-6 * std::max(mean(&stored[head], dim), 1e-20);
        Squares squares(static_cast<size_t>(dim));  // of what is stored then
        for (int64_t i = 0; i < dim; ++i) {
            const double factor = std::sqrt(std::sqrt((seen[head + i] + seen_floor) / (stored[head + i] + floor)));
            factors[head + i] = static_cast<float>(factor);
            squares[i] = factor * factor * stored[head + i] + floor;
        }
        const double size = std::sqrt(mean(squares.data(), dim));
        for (int64_t i = 0; i < dim; ++i) factors[head + i] = static_cast<float>(factors[head + i] / size);
    }
    return factors;
}

}  // namespace

KvBasis basis_of_weights(const Layer& layer, const ModelConfig& c, const Kernels& kernels) {
    Squares queries = mean_squares(layer.q, layer.attn_norm, kernels);
    Squares keys = mean_squares(layer.k, layer.attn_norm, kernels);
    normalize(queries, layer.q_norm);
    normalize(keys, layer.k_norm);
    for (size_t i = 0; i < layer.q_bias.size(); ++i) queries[i] += static_cast<double>(layer.q_bias[i]) * layer.q_bias[i];
    Squares seen = grouped(queries, c);
    mean_of_pairs(seen, c.head_dim);
    mean_of_pairs(keys, c.head_dim);

    Squares gain(static_cast<size_t>(c.n_heads * c.head_dim));
    for_each_row(layer.o, kernels, [&](int64_t, const std::vector<float>& values) {
        for (size_t i = 0; i < values.size(); ++i) gain[i] += values[i] * values[i];
    });
    const Squares values = mean_squares(layer.v, layer.attn_norm, kernels);
    return {layer.k_bias, balance(seen, keys, c.head_dim), layer.v_bias, balance(grouped(gain, c), values, c.head_dim)};
}

}  // namespace qq
