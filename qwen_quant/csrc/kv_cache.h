// Keys and values in FP16. It grows page by page, so growing never copies; a page of one layer holds
// keys [n_kv_heads, kPage, head_dim] and then values of the same shape.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"

namespace qq {

class KvCache {
public:
    static constexpr int64_t kPage = 256;

    KvCache(int64_t n_layers, int64_t n_kv_heads, int64_t head_dim)
        : n_kv_heads_(n_kv_heads), head_dim_(head_dim), layers_(static_cast<size_t>(n_layers)) {}

    void reserve(int64_t n_tokens) {
        const size_t pages = static_cast<size_t>((n_tokens + kPage - 1) / kPage);
        for (auto& layer : layers_) {
            while (layer.size() < pages) layer.emplace_back(page_bytes());
        }
    }

    void clear() {
        for (auto& layer : layers_) layer.clear();
    }

    // [head_dim] of one position; the positions up to the end of the page follow.
    uint16_t* key(int64_t layer, int64_t head, int64_t position) const {
        return layers_[layer][position / kPage].as<uint16_t>() + (head * kPage + position % kPage) * head_dim_;
    }
    uint16_t* value(int64_t layer, int64_t head, int64_t position) const {
        return key(layer, head, position) + n_kv_heads_ * kPage * head_dim_;
    }

    // Of one position in all layers.
    size_t bytes_per_token() const { return layers_.size() * page_bytes() / kPage; }

    size_t bytes() const {
        size_t total = 0;
        for (const auto& layer : layers_) total += layer.size() * page_bytes();
        return total;
    }

private:
    size_t page_bytes() const { return static_cast<size_t>(2 * n_kv_heads_ * kPage * head_dim_) * sizeof(uint16_t); }

    int64_t n_kv_heads_, head_dim_;
    std::vector<std::vector<Buffer>> layers_;
};

}  // namespace qq
