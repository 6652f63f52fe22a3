#include "vocabulary.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace qq {

namespace {

constexpr uint32_t kLastCharacter = 0x143;  // of the 256 that stand for bytes
constexpr int kSpace = -1, kForeign = -2;     // in place of a byte

// The byte of each character: printable Latin-1 is itself, the others follow from U+0100.
std::array<int16_t, kLastCharacter + 1> make_byte_table() {
    std::array<int16_t, kLastCharacter + 1> table;
    table.fill(kForeign);
    table[' '] = kSpace;
    uint32_t next = 0x100;
    for (uint32_t byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
        table[printable ? byte : next++] = static_cast<int16_t>(byte);
    }
    return table;
}

const std::array<int16_t, kLastCharacter + 1> kByteOf = make_byte_table();

// Goes through UTF-8 text: the byte that each character stands for.
class Speller {
public:
    explicit Speller(std::string_view text) : text_(text) {}
    bool done() const { return at_ == text_.size(); }
    int next() {
        const uint32_t first = static_cast<uint8_t>(text_[at_++]);
        if (first < 0x80) return kByteOf[first];
        if (at_ == text_.size()) return kForeign;
        const uint32_t character = (first & 0x1f) << 6 | (static_cast<uint8_t>(text_[at_]) & 0x3f);
        if (first < 0xc2 || first > 0xc5 || character > kLastCharacter) return kForeign;
        ++at_;
        return kByteOf[character];
    }

private:
    std::string_view text_;
    size_t at_ = 0;
};

uint64_t mix(uint64_t x) {
    x = (x ^ x >> 32) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 29) * 0xbf58476d1ce4e5b9u;
    return x ^ x >> 32;
}

uint64_t hash_of(std::string_view text) {
    uint64_t sum = text.size();
    for (size_t at = 0; at < text.size(); at += 8) {
        uint64_t word = 0;
        std::memcpy(&word, text.data() + at, std::min<size_t>(8, text.size() - at));
        sum = mix(sum + word);
    }
    return sum;
}

// The tokens of a vocabulary by 32 bits of their hashes, which fit into a cache. That a string which is none of them has
// the same bits at its place happens once in a thousand million times.
class TokenHashes {
public:
    TokenHashes(const Strings& tokens, const std::vector<bool>& is_token) {
        size_t size = 64;
        while (size < tokens.size() + tokens.size() / 2) size *= 2;
        slots_.resize(size);
        for (size_t i = 0; i < tokens.size(); ++i) {
            if (is_token[i]) place_of(tokens[i]) = tag_of(hash_of(tokens[i]));
        }
    }
    bool has(std::string_view text) { return place_of(text) != 0; }

private:
    static uint32_t tag_of(uint64_t hash) { return static_cast<uint32_t>(hash >> 32) | 1; }  // 0 is free
    uint32_t& place_of(std::string_view text) {
        const uint64_t hash = hash_of(text);
        size_t slot = hash & (slots_.size() - 1);
        while (slots_[slot] && slots_[slot] != tag_of(hash)) slot = (slot + 1) & (slots_.size() - 1);
        return slots_[slot];
    }

    std::vector<uint32_t> slots_;
};

}  // namespace

Strings::Strings(std::shared_ptr<const GgufFile> file, const std::string& key) : file_(std::move(file)) {
    const GgufValue* value = file_->find(key);
    if (!value || value->type != kArray || (value->element_type != kString && value->count > 0)) {
        file_->fail("key '" + key + "'", "missing or no list of strings", "export the file again");
    }
    items_ = &value->strings;
}

Strings::Strings(std::string text, const std::vector<size_t>& lengths) : text_(std::move(text)), items_(&parts_) {
    size_t at = 0;
    for (const size_t n : lengths) {
        parts_.push_back(std::string_view(text_).substr(at, n));
        at += n;
    }
}

bool ByteTriples::insert(std::vector<uint64_t>& set, uint32_t member) {
    const bool is_new = !contains(set, member);
    set[member / 64] |= uint64_t{1} << member % 64;
    return is_new;
}

bool ByteTriples::add(std::string_view spelled) {
    bool any_new = false;
    uint32_t window = 0;
    int n = 0;  // bytes in the window
    for (Speller speller(spelled); !speller.done();) {
        const int byte = speller.next();
        n = byte < 0 ? 0 : n + 1;
        window = (window << 8 | static_cast<uint32_t>(byte & 0xff)) & 0xffffff;
        if (n >= 2) any_new |= insert(pairs_, window & 0xffff);
        if (n >= 3) any_new |= insert(triples_, window);
    }
    return any_new;
}

bool ByteTriples::cover(std::string_view spelled) const {
    uint32_t window = 0;
    int n = 0;
    for (Speller speller(spelled); !speller.done();) {
        const int byte = speller.next();
        if (byte == kSpace) continue;
        if (byte == kForeign) return false;
        ++n;
        window = (window << 8 | static_cast<uint32_t>(byte)) & 0xffffff;
        if (n == 2 && !contains(pairs_, window)) return false;
        if (n >= 3 && !contains(triples_, window)) return false;
    }
    return true;
}

std::string find_bad_merge(const Strings& merges, const Strings& tokens, const std::vector<bool>& is_token) {
    TokenHashes known(tokens, is_token);
    std::string whole;
    size_t next = 256;  // behind the single bytes, tokens mostly stand in the order of their merges
    for (size_t i = 0; i < merges.size(); ++i) {
        const std::string_view merge = merges[i];
        const size_t space = merge.find(' ');
        const auto named = [&] { return "merge " + std::to_string(i) + " ('" + std::string(merge) + "')"; };
        if (space == std::string_view::npos) return named() + " is not two tokens";
        const std::string_view left = merge.substr(0, space), right = merge.substr(space + 1);
        whole.assign(left).append(right);
        const bool is_next = next < tokens.size() && is_token[next] && tokens[next] == whole;
        next += is_next;
        const auto lacks = [&](std::string_view part) {
            return named() + " needs '" + std::string(part) + "', which is no token";
        };
        if (!known.has(left)) return lacks(left);
        if (!known.has(right)) return lacks(right);
        if (!is_next && !known.has(whole)) return lacks(whole);
    }
    return "";
}

}  // namespace qq
