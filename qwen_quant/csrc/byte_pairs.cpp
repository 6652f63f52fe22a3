#include "byte_pairs.h"

#include <functional>
#include <queue>
#include <stdexcept>

namespace qq {

namespace {

constexpr uint64_t kFree = ~uint64_t{0};

uint64_t pair_of(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

// Bytes of the UTF-8 character that begins with `first`
size_t character_bytes(char first) {
    const unsigned char byte = static_cast<unsigned char>(first);
    return byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

struct Symbol {
    int32_t id;  // -1: merged into the one before
    int32_t before, after;
};

// A pair of neighbours that may become `merged`
struct Candidate {
    int32_t rank, at, merged;
    bool operator<(const Candidate& other) const {  // the queue brings out the largest
        return rank != other.rank ? rank > other.rank : at > other.at;
    }
};

}  // namespace

size_t BytePairs::table_size(size_t n) {
    size_t size = 16;
    while (size < 2 * n) size *= 2;
    return size;
}

size_t BytePairs::slot_of(std::string_view spelling) const {
    size_t at = std::hash<std::string_view>()(spelling) & (ids_.size() - 1);
    while (ids_[at] >= 0 && spellings_[static_cast<size_t>(ids_[at])] != spelling) at = (at + 1) & (ids_.size() - 1);
    return at;
}

size_t BytePairs::pair_slot_of(uint64_t pair) const {
    size_t at = (pair * 0x9e3779b97f4a7c15u >> 20) & (pairs_.size() - 1);
    while (pairs_[at] != kFree && pairs_[at] != pair) at = (at + 1) & (pairs_.size() - 1);
    return at;
}

BytePairs::BytePairs(const std::vector<std::string_view>& tokens, const std::vector<std::string_view>& merges,
                     const std::vector<int32_t>& absent)
    : spellings_(tokens.size()), ids_(table_size(tokens.size()), -1), pairs_(table_size(merges.size()), kFree),
      merges_(pairs_.size()) {
    size_t length = 0;
    for (const std::string_view token : tokens) length += token.size();
    text_.reserve(length);
    std::vector<bool> skipped(tokens.size());
    for (const int32_t id : absent) skipped.at(static_cast<size_t>(id)) = true;
    for (size_t i = 0; i < tokens.size(); ++i) {
        if (skipped[i]) continue;
        spellings_[i] = {text_.data() + text_.size(), tokens[i].size()};
        text_.append(tokens[i]);
        ids_[slot_of(spellings_[i])] = static_cast<int32_t>(i);
    }
    std::string both;
    for (size_t rank = 0; rank < merges.size(); ++rank) {
        const std::string_view merge = merges[rank];
        const size_t space = merge.find(' ');
        if (space == std::string_view::npos) throw std::invalid_argument("merge '" + std::string(merge) + "' has no space");
        const std::string_view left = merge.substr(0, space), right = merge.substr(space + 1);
        both.assign(left).append(right);
        const int32_t left_id = id_of(left), right_id = id_of(right), merged = id_of(both);
        if (left_id < 0 || right_id < 0 || merged < 0) {
            throw std::invalid_argument("merge '" + std::string(merge) + "' names what is no token");
        }
        const size_t at = pair_slot_of(pair_of(left_id, right_id));
        pairs_[at] = pair_of(left_id, right_id);
        merges_[at] = {static_cast<int32_t>(rank), merged};
    }
}

int32_t BytePairs::id_of(std::string_view spelling) const { return ids_[slot_of(spelling)]; }

const BytePairs::Merge* BytePairs::find_merge(int32_t left, int32_t right) const {
    const size_t at = pair_slot_of(pair_of(left, right));
    return pairs_[at] == kFree ? nullptr : &merges_[at];
}

void BytePairs::encode(std::string_view word, std::vector<int32_t>& ids) const {
    std::vector<Symbol> symbols;
    for (size_t at = 0; at < word.size();) {
        const std::string_view character = word.substr(at, character_bytes(word[at]));
        at += character.size();
        const int32_t id = id_of(character), here = static_cast<int32_t>(symbols.size());
        if (id >= 0) symbols.push_back({id, here - 1, here + 1});
    }
    if (symbols.empty()) return;
    symbols.back().after = -1;
    std::priority_queue<Candidate> queue;
    const auto consider = [&](int32_t at) {
        if (at < 0 || symbols[at].after < 0) return;
        const Merge* merge = find_merge(symbols[at].id, symbols[symbols[at].after].id);
        if (merge) queue.push({merge->rank, at, merge->merged});
    };
    for (size_t i = 0; i < symbols.size(); ++i) consider(static_cast<int32_t>(i));
    while (!queue.empty()) {
        const Candidate best = queue.top();
        queue.pop();
        Symbol& left = symbols[best.at];
        if (left.id < 0 || left.after < 0) continue;
        Symbol& right = symbols[left.after];
        const Merge* merge = find_merge(left.id, right.id);
        if (!merge || merge->merged != best.merged) continue;  // neighbours have changed since
        left.id = best.merged;
        left.after = right.after;
        right.id = -1;
        if (left.after >= 0) symbols[left.after].before = best.at;
        consider(left.before);
        consider(best.at);
    }
    for (int32_t i = 0; i >= 0; i = symbols[i].after) ids.push_back(symbols[i].id);
}

}  // namespace qq
