// Keys and values of one or several sequences. They grow page by page, so growing never copies, and sequences that begin
// alike share pages; a page of one layer holds the keys of its heads and then their values: in FP16 [kPage, head_dim] for
// each head, or quantized as kv_block.h says.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_set>
#include <vector>

#include "buffer.h"
#include "kv_block.h"
#include "kv_layout.h"

namespace qq {

class KvCache {
public:
    static constexpr int64_t kPage = kKvPage;

    KvCache(std::vector<KvLayer> layout, int64_t n_kv_heads, int64_t head_dim)
        : layout_(std::move(layout)), n_kv_heads_(n_kv_heads), head_dim_(head_dim), pages_(layout_.size()) {}

    // How many sequences there are; new ones are empty.
    void resize(int64_t n_sequences) { pages_.resize(static_cast<size_t>(n_sequences) * layout_.size()); }

    // What the functions below call `layer` is this number: a layer of the first sequence is its own.
    int64_t place(int64_t sequence, int64_t layer) const {
        return sequence * static_cast<int64_t>(layout_.size()) + layer;
    }

    // Room for the tokens [begin, end) of a sequence, in pages that no other sequence reads.
    void reserve(int64_t sequence, int64_t begin, int64_t end) {
        for (int64_t layer = 0; layer < place(1, 0); ++layer) {
            Pages& pages = pages_[place(sequence, layer)];
            const size_t first = static_cast<size_t>(begin / kPage), count = static_cast<size_t>((end + kPage - 1) / kPage);
            while (pages.size() < count) pages.push_back(std::make_shared<Buffer>(page_bytes(layer)));
            for (size_t i = first; i < count; ++i) {
                if (pages[i].use_count() == 1) continue;
                const std::shared_ptr<Buffer> shared = pages[i];
                pages[i] = std::make_shared<Buffer>(page_bytes(layer));
                std::memcpy(pages[i]->data(), shared->data(), page_bytes(layer));
            }
        }
    }

    // Gives the pages of the first sequence to another one as well.
    void share(int64_t sequence) {
        std::copy(pages_.begin(), pages_.begin() + place(1, 0), pages_.begin() + place(sequence, 0));
    }

    void clear() {
        for (Pages& pages : pages_) pages.clear();
    }

    const KvLayer& layout(int64_t layer) const { return layout_[static_cast<size_t>(layer) % layout_.size()]; }

    // A head's keys (values) of the page that `position` lies in.
    uint8_t* key_page(int64_t layer, int64_t head, int64_t position) const {
        return pages_[layer][position / kPage]->data() + static_cast<size_t>(head) * key_bytes(layer);
    }
    uint8_t* value_page(int64_t layer, int64_t head, int64_t position) const {
        return pages_[layer][position / kPage]->data() + static_cast<size_t>(n_kv_heads_) * key_bytes(layer) +
               static_cast<size_t>(head) * value_bytes(layer);
    }

    // FP16 [head_dim] of one position; the positions up to the end of the page follow.
    uint16_t* key(int64_t layer, int64_t head, int64_t position) const {
        return reinterpret_cast<uint16_t*>(key_page(layer, head, position)) + position % kPage * head_dim_;
    }
    uint16_t* value(int64_t layer, int64_t head, int64_t position) const {
        return reinterpret_cast<uint16_t*>(value_page(layer, head, position)) + position % kPage * head_dim_;
    }

    // Quantized, the n positions from a multiple of kKvBlock on, all in one page.
    KvTokens keys(int64_t layer, int64_t head, int64_t position, int64_t n) const {
        return tokens(layout(layer).key.type, key_page(layer, head, position), position % kPage, n);
    }
    KvTokens values(int64_t layer, int64_t head, int64_t position, int64_t n) const {
        return tokens(layout(layer).value.type, value_page(layer, head, position), position % kPage, n);
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

    size_t bytes() const {
        std::unordered_set<const Buffer*> counted;
        size_t total = 0;
        for (const Pages& pages : pages_) {
            for (const std::shared_ptr<Buffer>& page : pages) {
                if (counted.insert(page.get()).second) total += page->bytes();
            }
        }
        return total;
    }

    double bytes_per_token() const {
        size_t total = 0;
        for (int64_t layer = 0; layer < place(1, 0); ++layer) total += page_bytes(layer);
        return static_cast<double>(total) / kPage;
    }

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

    using Pages = std::vector<std::shared_ptr<Buffer>>;

    size_t key_bytes(int64_t layer) const { return kv_head_bytes(layout(layer).key.type, head_dim_); }
    size_t value_bytes(int64_t layer) const { return kv_head_bytes(layout(layer).value.type, head_dim_); }
    size_t page_bytes(int64_t layer) const {
        return static_cast<size_t>(n_kv_heads_) * (key_bytes(layer) + value_bytes(layer));
    }
    KvTokens tokens(KvType type, const uint8_t* page, int64_t slot, int64_t n) const {
        return {page + kv_codes_at(type, head_dim_, slot), page + kv_code_bytes(type, head_dim_) + slot, n, head_dim_};
    }

    std::vector<KvLayer> layout_;
    int64_t n_kv_heads_, head_dim_;
    std::vector<Pages> pages_;  // of each layer of each sequence
};

}  // namespace qq
