// The latest tokens of a quantized cache in FP16, beside their codes. A token reads the positions of its own stretch of
// kKvRecent here, and earlier ones from their codes: which it reads follows from its position alone, so it sees the same in
// any batch. They are stored in the basis of the codes, so one sum takes both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kv_layout.h"

namespace qq {

class RecentTokens {
public:
    // Kept in each layer, the position's remainder being the slot. Twice a stretch: a step of up to kKvRecent + 1 tokens
    // leaves whole what is read after taking back any of them.
    static constexpr int64_t kSlots = 2 * kKvRecent;

    RecentTokens(const std::vector<KvLayer>& layout, int64_t n_kv_heads, int64_t head_dim)
        : n_kv_heads_(n_kv_heads), head_dim_(head_dim), slots_(layout.size()) {
        for (const KvLayer& layer : layout) {
            keys_.push_back(layer.key.quantized() ? n_kv_heads : 0);
            values_.push_back(layer.value.quantized() ? n_kv_heads : 0);
        }
        for (size_t i = 0; i < slots_.size(); ++i) {
            slots_[i].resize(static_cast<size_t>((keys_[i] + values_[i]) * kSlots * head_dim));
        }
    }

    void clear() { held_ = 0; }

    void begin_step(int64_t first, int64_t n) {
        first_ = first;
        end_ = first + n;
        readable_ = std::min(held_, first);
        held_ = std::max(readable_, end_ - kSlots);
        begin_ = from(first);
        long_ = end_ - begin_ > kSlots;
        const size_t room = static_cast<size_t>(2 * n_kv_heads_ * (end_ - begin_) * head_dim_);
        if (long_ && step_.size() < room) step_.resize(room);
    }

    // Where a token at `position` begins to read here: after taking back more than is held, some read their codes.
    int64_t from(int64_t position) const { return std::max(position / kKvRecent * kKvRecent, readable_); }

    // FP16 [head_dim] of one position, and then those of its stretch that follow.
    uint16_t* at(int64_t layer, bool values, int64_t head, int64_t position) {
        if (!long_) return slot(layer, values, head, position);
        const int64_t row = ((values ? n_kv_heads_ : 0) + head) * (end_ - begin_) + position - begin_;
        return step_.data() + row * head_dim_;
    }

    // A long step has its tokens of one layer elsewhere: these bring in what comes before it, and keep the last of it.
    void begin_head(int64_t layer, bool values, int64_t head) {
        if (!long_ || !has(layer, values)) return;
        for (int64_t p = begin_; p < first_; ++p) copy(slot(layer, values, head, p), at(layer, values, head, p));
    }
    void end_head(int64_t layer, bool values, int64_t head) {
        if (!long_ || !has(layer, values)) return;
        for (int64_t p = std::max(first_, end_ - kSlots); p < end_; ++p) {
            copy(at(layer, values, head, p), slot(layer, values, head, p));
        }
    }

    // The longest context of at most n tokens that can be gone back to with nothing lost: its stretch is held, or begins.
    int64_t exact_past(int64_t n) const { return n / kKvRecent * kKvRecent < held_ ? n / kKvRecent * kKvRecent : n; }

    // What is kept of a layer as bytes, and from which position on it is held.
    size_t layer_bytes(int64_t layer) const { return slot_bytes(layer) ? slot_bytes(layer) + sizeof(held_) : 0; }
    void copy_out(int64_t layer, uint8_t* out) const {
        if (!slot_bytes(layer)) return;
        std::memcpy(out, slots_[layer].data(), slot_bytes(layer));
        std::memcpy(out + slot_bytes(layer), &held_, sizeof(held_));
    }
    void copy_in(int64_t layer, int64_t n_tokens, const uint8_t* in) {
        if (!slot_bytes(layer)) return;
        std::memcpy(slots_[layer].data(), in, slot_bytes(layer));
        std::memcpy(&held_, in + slot_bytes(layer), sizeof(held_));
        held_ = std::clamp(held_, std::max<int64_t>(0, n_tokens - kSlots), n_tokens);
    }

    size_t bytes() const {
        size_t total = 0;
        for (size_t layer = 0; layer < slots_.size(); ++layer) total += slot_bytes(layer);
        return total;
    }
    size_t scratch_bytes() const { return step_.size() * sizeof(uint16_t); }

private:
    bool has(int64_t layer, bool values) const { return (values ? values_ : keys_)[layer] > 0; }
    size_t slot_bytes(int64_t layer) const { return slots_[layer].size() * sizeof(uint16_t); }
    uint16_t* slot(int64_t layer, bool values, int64_t head, int64_t position) {
        const int64_t row = ((values ? keys_[layer] : 0) + head) * kSlots + position % kSlots;
        return slots_[layer].data() + row * head_dim_;
    }
    void copy(const uint16_t* from, uint16_t* to) const {
        std::memcpy(to, from, static_cast<size_t>(head_dim_) * sizeof(uint16_t));
    }

    int64_t n_kv_heads_, head_dim_;
    std::vector<int64_t> keys_, values_;        // heads of each layer that are kept: all or none
    std::vector<std::vector<uint16_t>> slots_;  // of each layer [heads of keys, then of values][kSlots, head_dim]
    int64_t held_ = 0;                    // the slots hold the positions from here to the end of the context
    int64_t first_ = 0, end_ = 0, begin_ = 0, readable_ = 0;  // of this step: its tokens, and what lies here before them
    bool long_ = false;                                       // whether it has more tokens than there are slots
    std::vector<uint16_t> step_;                              // a long step's, [2, heads][end - begin, head_dim]
};

}  // namespace qq
