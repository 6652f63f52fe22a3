// A vocabulary as it lies in a GGUF file, and the part of it that a text can need.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gguf.h"

namespace qq {

// Strings by their number, which are not copied.
class Strings {
public:
    // Those of a file's key. Raises FormatError when it has none.
    Strings(std::shared_ptr<const GgufFile> file, const std::string& key);
    // The parts of `text` with these lengths, which together are the whole of it.
    Strings(std::string text, const std::vector<size_t>& lengths);
    Strings(const Strings&) = delete;
    Strings& operator=(const Strings&) = delete;

    size_t size() const { return items_->size(); }
    std::string_view operator[](size_t i) const { return (*items_)[i]; }

private:
    std::shared_ptr<const GgufFile> file_;
    std::string text_;
    std::vector<std::string_view> parts_;
    const std::vector<std::string_view>* items_;
};

// Which three bytes follow one another in some texts. Texts and tokens are spelled byte by byte, each byte as the
// character that GPT-2 writes for it (qwen_quant/byte_level.py).
class ByteTriples {
public:
    // Whether that brought anything new.
    bool add(std::string_view spelled);
    // Whether all pairs and triples of a token occur. Then it may be a part of the texts; otherwise it is none. Spaces,
    // which stand between the halves of a merge, do not count.
    bool cover(std::string_view spelled) const;

private:
    bool insert(std::vector<uint64_t>& set, uint32_t member);
    static bool contains(const std::vector<uint64_t>& set, uint32_t member) { return set[member / 64] >> member % 64 & 1; }

    std::vector<uint64_t> pairs_ = std::vector<uint64_t>((size_t{1} << 16) / 64);
    std::vector<uint64_t> triples_ = std::vector<uint64_t>((size_t{1} << 24) / 64);
};

// What is wrong with the first merge ("left right") of which a half or the whole is no token, or else nothing.
// is_token: [tokens.size()].
std::string find_bad_merge(const Strings& merges, const Strings& tokens, const std::vector<bool>& is_token);

}  // namespace qq
