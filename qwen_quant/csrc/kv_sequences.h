// The caches of several sequences as if they were one with more layers: what KvCache calls `layer` is here a place, which
// stands for a layer of a sequence. Places of the first sequence are its layers, so whoever knows only that need not know
// of others.
#pragma once

#include <unordered_set>
#include <utility>

#include "kv_cache.h"

namespace qq {

class KvSequences {
public:
    explicit KvSequences(KvCache first) : n_layers_(first.n_layers()) { caches_.push_back(std::move(first)); }

    int64_t place(int64_t sequence, int64_t layer) const { return sequence * n_layers_ + layer; }

    // All sequences hold what the first one holds, in the same pages.
    void fork(int64_t n_sequences) {
        caches_.erase(caches_.begin() + 1, caches_.end());
        caches_.resize(static_cast<size_t>(n_sequences), caches_.front());
    }
    void reserve(int64_t sequence, int64_t first, int64_t n_tokens) {
        caches_[static_cast<size_t>(sequence)].reserve(first, n_tokens);
    }
    void clear() {
        for (KvCache& cache : caches_) cache.clear();
    }

    const KvLayer& layout(int64_t place) const { return cache(place).layout(layer(place)); }
    uint8_t* key_page(int64_t place, int64_t head, int64_t position) const {
        return cache(place).key_page(layer(place), head, position);
    }
    uint8_t* value_page(int64_t place, int64_t head, int64_t position) const {
        return cache(place).value_page(layer(place), head, position);
    }
    uint16_t* key(int64_t place, int64_t head, int64_t position) const {
        return cache(place).key(layer(place), head, position);
    }
    uint16_t* value(int64_t place, int64_t head, int64_t position) const {
        return cache(place).value(layer(place), head, position);
    }
    KvTokens keys(int64_t place, int64_t head, int64_t position, int64_t n) const {
        return cache(place).keys(layer(place), head, position, n);
    }
    KvTokens values(int64_t place, int64_t head, int64_t position, int64_t n) const {
        return cache(place).values(layer(place), head, position, n);
    }

    const KvCache& first() const { return caches_.front(); }
    KvCache& first() { return caches_.front(); }

    // What is shared counts once.
    size_t bytes() const {
        std::unordered_set<const Buffer*> counted;
        size_t total = 0;
        for (const KvCache& cache : caches_) {
            cache.for_each_page([&](const Buffer& page) {
                if (counted.insert(&page).second) total += page.bytes();
            });
        }
        return total;
    }

private:
    const KvCache& cache(int64_t place) const { return caches_[static_cast<size_t>(place / n_layers_)]; }
    int64_t layer(int64_t place) const { return place % n_layers_; }

    int64_t n_layers_;
    std::vector<KvCache> caches_;
};

}  // namespace qq
