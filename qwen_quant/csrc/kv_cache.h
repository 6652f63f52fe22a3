// Keys and values. They grow page by page, so growing never copies. A page holds its tokens' keys and values of all
// layers, large enough for large pages of the system; each layer's part the keys of its heads and then their values: in
// FP16 [kPage, head_dim] for each head, or quantized as kv_block.h says.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "kv_block.h"
#include "kv_layout.h"
#include "large_pages.h"

namespace qq {

class KvCache {
public:
    static constexpr int64_t kPage = kKvPage;

    KvCache(std::vector<KvLayer> layout, int64_t n_kv_heads, int64_t head_dim)
        : layout_(std::move(layout)), n_kv_heads_(n_kv_heads), head_dim_(head_dim) {
        for (size_t layer = 0; layer < layout_.size(); ++layer) {
            layer_at_.push_back(page_bytes_);
            page_bytes_ += static_cast<size_t>(n_kv_heads_) * (key_bytes(layer) + value_bytes(layer));
        }
    }

    void reserve(int64_t n_tokens) {
        const size_t count = static_cast<size_t>((n_tokens + kPage - 1) / kPage);
        while (pages_.size() < count) {
            pages_.emplace_back(page_bytes_);
            advise_large_pages(pages_.back());
        }
    }

    void clear() { pages_.clear(); }

    const KvLayer& layout(int64_t layer) const { return layout_[static_cast<size_t>(layer)]; }

    // A head's keys (values) of the page that `position` lies in.
    uint8_t* key_page(int64_t layer, int64_t head, int64_t position) const {
        return layer_page(layer, position) + static_cast<size_t>(head) * key_bytes(layer);
    }
    uint8_t* value_page(int64_t layer, int64_t head, int64_t position) const {
        return layer_page(layer, position) + static_cast<size_t>(n_kv_heads_) * key_bytes(layer) +
               static_cast<size_t>(head) * value_bytes(layer);
    }

    // FP16 [head_dim] of one position; the positions up to the end of the page follow.
    uint16_t* key(int64_t layer, int64_t head, int64_t position) const {
        return reinterpret_cast<uint16_t*>(key_page(layer, head, position)) + position % kPage * head_dim_;
    }
    uint16_t* value(int64_t layer, int64_t head, int64_t position) const {
        return reinterpret_cast<uint16_t*>(value_page(layer, head, position)) + position % kPage * head_dim_;
    }

    // The position after n others, where there is room for it.
    int64_t following(int64_t position, int64_t n) const {
        return position + n < static_cast<int64_t>(pages_.size()) * kPage ? position + n : position;
    }

    // The codes from `position` on, up to the end of the page, whatever their type.
    const uint8_t* key_codes(int64_t layer, int64_t head, int64_t position) const {
        return key_page(layer, head, position) + kv_codes_at(layout(layer).key.type, head_dim_, position % kPage);
    }
    const uint8_t* value_codes(int64_t layer, int64_t head, int64_t position) const {
        return value_page(layer, head, position) + kv_codes_at(layout(layer).value.type, head_dim_, position % kPage);
    }

    // Quantized, the n positions from a multiple of kKvBlock on, all in one page.
    KvTokens keys(int64_t layer, int64_t head, int64_t position, int64_t n) const {
        const uint8_t* scales = key_page(layer, head, position) + kv_code_bytes(layout(layer).key.type, head_dim_);
        return {key_codes(layer, head, position), scales + position % kPage, n, head_dim_, nullptr};
    }
    KvTokens values(int64_t layer, int64_t head, int64_t position, int64_t n) const {
        const uint8_t* scales = value_page(layer, head, position) + kv_code_bytes(layout(layer).value.type, head_dim_);
        return {value_codes(layer, head, position), scales + position % kPage, n, head_dim_, nullptr};
    }

    // The first n positions of one layer as one piece: all heads' keys, then their values; of a quantized page always all.
    size_t layer_bytes(int64_t layer, int64_t n) const {
        size_t total = 0;
        for_each_run(layer, n, [&](uint8_t*, size_t bytes) { total += bytes; });
        return total;
    }
    void copy_out(int64_t layer, int64_t n, uint8_t* out) const {
        for_each_run(layer, n, [&](uint8_t* run, size_t bytes) {
            std::memcpy(out, run, bytes);
            out += bytes;
        });
    }
    void copy_in(int64_t layer, int64_t n, const uint8_t* in) {
        for_each_run(layer, n, [&](uint8_t* run, size_t bytes) {
            std::memcpy(run, in, bytes);
            in += bytes;
        });
    }

    size_t bytes() const { return pages_.size() * page_bytes_; }

    double bytes_per_token() const { return static_cast<double>(page_bytes_) / kPage; }

private:
    // Calls visit(begin, bytes) for the stretches that the first n positions lie in.
    template <class Visit>
    void for_each_run(int64_t layer, int64_t n, Visit visit) const {
        for (const bool values : {false, true}) {
            const bool quantized = values ? layout(layer).value.quantized() : layout(layer).key.quantized();
            const size_t whole = values ? value_bytes(layer) : key_bytes(layer);
            for (int64_t head = 0; head < n_kv_heads_; ++head) {
                for (int64_t first = 0; first < n; first += kPage) {
                    const int64_t count = std::min(kPage, n - first);
                    visit(values ? value_page(layer, head, first) : key_page(layer, head, first),
                          quantized ? whole : static_cast<size_t>(count * head_dim_) * sizeof(uint16_t));
                }
            }
        }
    }

    size_t key_bytes(size_t layer) const { return kv_head_bytes(layout_[layer].key.type, head_dim_); }
    size_t value_bytes(size_t layer) const { return kv_head_bytes(layout_[layer].value.type, head_dim_); }
    uint8_t* layer_page(int64_t layer, int64_t position) const {
        return pages_[static_cast<size_t>(position / kPage)].data() + layer_at_[static_cast<size_t>(layer)];
    }
    std::vector<KvLayer> layout_;
    int64_t n_kv_heads_, head_dim_;
    std::vector<size_t> layer_at_;  // where a layer's part of a page begins
    size_t page_bytes_ = 0;
    std::vector<Buffer> pages_;
};

}  // namespace qq
