// Keys and values of one or several sequences. They grow page by page, so growing never copies, and sequences that begin
// alike share pages. A page holds its tokens' keys and values of all layers, large enough for large pages of the system;
// each layer's part the keys of its heads and then their values: in FP16 [kPage, head_dim] for each head, or quantized as
// kv_block.h says. What is quantized is kept in FP16 too while it is recent: see kv_recent.h.
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
#include "kv_recent.h"
#include "large_pages.h"

namespace qq {

class KvCache {
public:
    static constexpr int64_t kPage = kKvPage;

    KvCache(std::vector<KvLayer> layout, int64_t n_kv_heads, int64_t head_dim)
        : layout_(std::move(layout)),
          n_kv_heads_(n_kv_heads),
          head_dim_(head_dim),
          recent_(1, RecentTokens(layout_, n_kv_heads, head_dim)) {
        for (int64_t layer = 0; layer < place(1, 0); ++layer) {
            layer_at_.push_back(page_bytes_);
            page_bytes_ += static_cast<size_t>(n_kv_heads_) * (key_bytes(layer) + value_bytes(layer));
        }
        resize(1);
    }

    // How many sequences there are; new ones are empty.
    void resize(int64_t n_sequences) {
        pages_.resize(static_cast<size_t>(n_sequences));
        recent_.resize(static_cast<size_t>(n_sequences), RecentTokens(layout_, n_kv_heads_, head_dim_));
    }

    // What the functions below call `layer` is this number: a layer of the first sequence is its own.
    int64_t place(int64_t sequence, int64_t layer) const {
        return sequence * static_cast<int64_t>(layout_.size()) + layer;
    }

    // Room for the tokens [begin, end) of a sequence, in pages that no other sequence reads.
    void reserve(int64_t sequence, int64_t begin, int64_t end) {
        Pages& pages = pages_[static_cast<size_t>(sequence)];
        const size_t first = static_cast<size_t>(begin / kPage), count = static_cast<size_t>((end + kPage - 1) / kPage);
        while (pages.size() < count) pages.push_back(new_page(pages.size()));
        for (size_t i = first; i < count; ++i) {
            if (pages[i].use_count() == 1) continue;
            const std::shared_ptr<Buffer> shared = pages[i];
            pages[i] = new_page(i);
            std::memcpy(pages[i]->data(), shared->data(), page_bytes_);
        }
    }

    // Gives the pages of the first sequence to another one as well.
    void share(int64_t sequence) {
        recent_[static_cast<size_t>(sequence)] = recent_[0];
        pages_[static_cast<size_t>(sequence)] = pages_[0];
    }

    void clear() {
        for (Pages& pages : pages_) pages.clear();
        for (RecentTokens& recent : recent_) recent.clear();
    }

    // Before a sequence's tokens at positions [first, first + n) are stored, which `reserve` has made room for.
    void begin_step(int64_t sequence, int64_t first, int64_t n) {
        recent_[static_cast<size_t>(sequence)].begin_step(first, n);
    }
    // Around the storing of these tokens' keys (or values) of one head.
    void begin_head(int64_t layer, bool values, int64_t head) { recent(layer).begin_head(own(layer), values, head); }
    void end_head(int64_t layer, bool values, int64_t head) { recent(layer).end_head(own(layer), values, head); }

    const KvLayer& layout(int64_t layer) const { return layout_[static_cast<size_t>(own(layer))]; }

    // A head's keys (values) of the page that `position` lies in.
    uint8_t* key_page(int64_t layer, int64_t head, int64_t position) const {
        return layer_page(layer, position) + static_cast<size_t>(head) * key_bytes(layer);
    }
    uint8_t* value_page(int64_t layer, int64_t head, int64_t position) const {
        return layer_page(layer, position) + static_cast<size_t>(n_kv_heads_) * key_bytes(layer) +
               static_cast<size_t>(head) * value_bytes(layer);
    }

    int64_t exact_past(int64_t n) const { return recent_[0].bytes() ? recent_[0].exact_past(n) : n; }

    // Where a token at `position` begins to read FP16.
    int64_t half_from(int64_t layer, int64_t position) const {
        return layout(layer).quantized() ? recent(layer).from(position) : 0;
    }

    // FP16 [head_dim] of one position from half_from on; the positions up to the end of the stretch follow, or of the page
    // where nothing is quantized. Quantized keys and values are in the basis of their codes.
    uint16_t* key(int64_t layer, int64_t head, int64_t position) {
        if (layout(layer).key.quantized()) return recent(layer).at(own(layer), false, head, position);
        return reinterpret_cast<uint16_t*>(key_page(layer, head, position)) + position % kPage * head_dim_;
    }
    uint16_t* value(int64_t layer, int64_t head, int64_t position) {
        if (layout(layer).value.quantized()) return recent(layer).at(own(layer), true, head, position);
        return reinterpret_cast<uint16_t*>(value_page(layer, head, position)) + position % kPage * head_dim_;
    }

    // The codes from `position` on, up to the end of the page, whatever their type.
    const uint8_t* key_codes(int64_t layer, int64_t head, int64_t position) const {
        return key_page(layer, head, position) + kv_codes_at(layout(layer).key.type, head_dim_, position % kPage);
    }
    const uint8_t* value_codes(int64_t layer, int64_t head, int64_t position) const {
        return value_page(layer, head, position) + kv_codes_at(layout(layer).value.type, head_dim_, position % kPage);
    }

    // Quantized, the n positions from a multiple of kKvBlock on, all in one block.
    KvTokens keys(int64_t layer, int64_t head, int64_t position, int64_t n) const {
        const size_t scales = kv_scales_at(layout(layer).key.type, head_dim_, position % kPage);
        return {key_codes(layer, head, position), key_page(layer, head, position) + scales, n, head_dim_, nullptr};
    }
    KvTokens values(int64_t layer, int64_t head, int64_t position, int64_t n) const {
        const size_t scales = kv_scales_at(layout(layer).value.type, head_dim_, position % kPage);
        return {value_codes(layer, head, position), value_page(layer, head, position) + scales, n, head_dim_, nullptr};
    }

    // The first n positions of one layer as one piece: all heads' keys, then their values; of a quantized page always all,
    // and what is recent.
    size_t layer_bytes(int64_t layer, int64_t n) const {
        size_t total = recent(layer).layer_bytes(own(layer));
        for_each_run(layer, n, [&](uint8_t*, size_t bytes) { total += bytes; });
        return total;
    }
    void copy_out(int64_t layer, int64_t n, uint8_t* out) const {
        for_each_run(layer, n, [&](uint8_t* run, size_t bytes) {
            std::memcpy(out, run, bytes);
            out += bytes;
        });
        recent(layer).copy_out(own(layer), out);
    }
    void copy_in(int64_t layer, int64_t n, const uint8_t* in) {
        for_each_run(layer, n, [&](uint8_t* run, size_t bytes) {
            std::memcpy(run, in, bytes);
            in += bytes;
        });
        recent(layer).copy_in(own(layer), n, in);
    }

    size_t bytes() const {
        std::unordered_set<const Buffer*> counted;
        size_t total = recent_bytes();
        for (const Pages& pages : pages_) {
            for (const std::shared_ptr<Buffer>& page : pages) {
                if (counted.insert(page.get()).second) total += page->bytes();
            }
        }
        return total;
    }
    // Of all layers, whatever the context.
    size_t recent_bytes() const {
        size_t total = 0;
        for (const RecentTokens& recent : recent_) total += recent.bytes();
        return total;
    }
    size_t scratch_bytes() const {
        size_t total = 0;
        for (const RecentTokens& recent : recent_) total += recent.scratch_bytes();
        return total;
    }

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

    using Pages = std::vector<std::shared_ptr<Buffer>>;

    // The number of a layer within its sequence, and that sequence.
    int64_t own(int64_t layer) const { return layer % static_cast<int64_t>(layout_.size()); }
    size_t sequence(int64_t layer) const { return static_cast<size_t>(layer) / layout_.size(); }
    RecentTokens& recent(int64_t layer) { return recent_[sequence(layer)]; }
    const RecentTokens& recent(int64_t layer) const { return recent_[sequence(layer)]; }

    size_t key_bytes(int64_t layer) const { return kv_head_bytes(layout(layer).key.type, head_dim_); }
    size_t value_bytes(int64_t layer) const { return kv_head_bytes(layout(layer).value.type, head_dim_); }
    // A short context needs a little of every layer's part. The system's large pages would all be cleared and held for
    // it, so the first page does without.
    std::shared_ptr<Buffer> new_page(size_t index) const {
        auto page = std::make_shared<Buffer>(page_bytes_);
        if (index > 0) advise_large_pages(*page);
        return page;
    }
    uint8_t* layer_page(int64_t layer, int64_t position) const {
        return pages_[sequence(layer)][static_cast<size_t>(position / kPage)]->data() +
               layer_at_[static_cast<size_t>(own(layer))];
    }
    std::vector<KvLayer> layout_;
    int64_t n_kv_heads_, head_dim_;
    std::vector<size_t> layer_at_;  // where a layer's part of a page begins
    size_t page_bytes_ = 0;
    std::vector<Pages> pages_;          // of each sequence
    std::vector<RecentTokens> recent_;  // of each sequence
};

}  // namespace qq
