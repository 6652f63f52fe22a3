// Byte-pair encoding of words by a vocabulary and ranked merges (Sennrich et al. 2016), as the tokenizers library does
// it, which takes several times as long to build from the 150,000 merges of a Qwen model.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace qq {

class BytePairs {
public:
    // Token i is spelled tokens[i], unless it is one of `absent`; a merge is "left right", earlier ones come first.
    // Throws std::invalid_argument for a merge that is not two tokens which make a third.
    BytePairs(const std::vector<std::string_view>& tokens, const std::vector<std::string_view>& merges,
              const std::vector<int32_t>& absent);

    int32_t id_of(std::string_view spelling) const;  // -1: no token

    // Appends the ids of a word. Characters that are no token are left out, as by the tokenizers library.
    void encode(std::string_view word, std::vector<int32_t>& ids) const;

private:
    struct Merge {
        int32_t rank, merged;
    };
    // Tables are twice as large as what they hold; a place that is taken leads to the next one.
    static size_t table_size(size_t n);
    size_t slot_of(std::string_view spelling) const;
    size_t pair_slot_of(uint64_t pair) const;
    const Merge* find_merge(int32_t left, int32_t right) const;

    std::string text_;                         // all spellings
    std::vector<std::string_view> spellings_;  // of each token
    std::vector<int32_t> ids_;                 // table by spelling: -1 where a place is free
    std::vector<uint64_t> pairs_;              // table by left and right token: kFree where a place is free
    std::vector<Merge> merges_;                // beside pairs_
};

}  // namespace qq
