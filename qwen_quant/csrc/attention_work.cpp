#include "attention_work.h"

#include <algorithm>

namespace qq {

namespace {

// Groups begin at multiples in the context, so that all of a group read the same tokens in FP16.
std::vector<AttentionUnit> token_groups(const std::vector<Part>& parts) {
    std::vector<AttentionUnit> groups;
    for (size_t i = 0; i < parts.size(); ++i) {
        const Part& part = parts[i];
        for (int64_t t0 = 0, t1; t0 < part.n_tokens; t0 = t1) {
            t1 = std::min(t0 + kTokenGroup - (part.first + t0) % kTokenGroup, part.n_tokens);
            groups.push_back({static_cast<int64_t>(i), t0, t1, 0, 0, part.first + t1});
        }
    }
    return groups;
}

}  // namespace

std::vector<AttentionUnit> attention_work(const std::vector<Part>& parts, int64_t n_kv_heads, int n_threads) {
    // Of fewer pieces than this for each thread, one may be left over for which the others wait too long. As many for
    // each are fair as they are: a head in one piece reads ahead.
    constexpr int64_t kEnough = 4;
    const std::vector<AttentionUnit> groups = token_groups(parts);
    const int64_t n_groups = static_cast<int64_t>(groups.size());
    const int64_t pieces = n_groups * n_kv_heads;
    const bool split = pieces % n_threads != 0 && pieces < kEnough * n_threads;
    std::vector<AttentionUnit> units;
    for (int64_t i = 0; i < n_groups; ++i) {
        // Later tokens see more positions: in turns from both ends, every stretch of the list holds the same mix.
        const AttentionUnit& group = groups[static_cast<size_t>(i % 2 == 0 ? i / 2 : n_groups - 1 - i / 2)];
        const int64_t step = split ? kAttentionChunk : group.end;
        for (int64_t head = 0; head < n_kv_heads; ++head) {
            for (int64_t begin = 0; begin < group.end; begin += step) {
                units.push_back({group.part, group.t0, group.t1, head, begin, std::min(begin + step, group.end)});
            }
        }
    }
    return units;
}

}  // namespace qq
