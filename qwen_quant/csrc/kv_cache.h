// Keys and values in FP16. It grows page by page, so growing never copies; a page of one layer holds
// keys [n_kv_heads, kPage, head_dim] and then values of the same shape.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
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

    static constexpr const char* kType = "f16";  // as the options and prompt cache files call it

    // The first n positions of one layer as one piece, without the pages: keys [n_kv_heads, n, head_dim], then values.
    size_t layer_bytes(int64_t n) const { return static_cast<size_t>(2 * n_kv_heads_ * n * head_dim_) * sizeof(uint16_t); }
    void copy_out(int64_t layer, int64_t n, uint8_t* out) const {
        for_each_run(layer, n, [&](uint16_t* run, size_t bytes) {
            std::memcpy(out, run, bytes);
            out += bytes;
        });
    }
    void copy_in(int64_t layer, int64_t n, const uint8_t* in) {
        for_each_run(layer, n, [&](uint16_t* run, size_t bytes) {
            std::memcpy(run, in, bytes);
            in += bytes;
        });
    }

    // Of one position in all layers.
    size_t bytes_per_token() const { return layers_.size() * layer_bytes(1); }

    size_t bytes() const {
        size_t total = 0;
        for (const auto& layer : layers_) total += layer.size() * page_bytes();
        return total;
    }

private:
    // Calls visit(begin, bytes) for the stretches that the first n positions lie in, in the order of layer_bytes.
    template <class Visit>
    void for_each_run(int64_t layer, int64_t n, Visit visit) const {
        for (const bool values : {false, true}) {
            for (int64_t head = 0; head < n_kv_heads_; ++head) {
                for (int64_t first = 0; first < n; first += kPage) {
                    const int64_t count = std::min(kPage, n - first);
                    visit(values ? value(layer, head, first) : key(layer, head, first),
                          static_cast<size_t>(count * head_dim_) * sizeof(uint16_t));
                }
            }
        }
    }

    size_t page_bytes() const { return static_cast<size_t>(2 * n_kv_heads_ * kPage * head_dim_) * sizeof(uint16_t); }

    int64_t n_kv_heads_, head_dim_;
    std::vector<std::vector<Buffer>> layers_;
};

}  // namespace qq
