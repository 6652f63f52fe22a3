// How the attention of a step is divided: by sequences, tokens, key/value heads, and where that leaves threads idle by the
// positions that are attended to.
#pragma once

#include <cstdint>
#include <vector>

namespace qq {

constexpr int64_t kTokenGroup = 4;  // tokens that share each read of a key and value
// Positions whose softmax is summed up for itself; the sums are then merged in order. That is done with any number of
// threads, one included, so that the result does not depend on it.
constexpr int64_t kAttentionChunk = 256;

// Consecutive rows of a step that belong to one sequence.
struct Part {
    int64_t sequence;
    int64_t row;  // of the first token among all of the step
    int64_t n_tokens;
    int64_t first;  // position of the first token
};

// Tokens [t0, t1) of a part with all query heads that share a key/value head, over the positions [begin, end): all that
// the tokens see, or one chunk of them. Chunks of the same tokens and head follow one another.
struct AttentionUnit {
    int64_t part, t0, t1, kv_head;
    int64_t begin, end;
};

inline int64_t chunks_before(int64_t position) { return (position + kAttentionChunk - 1) / kAttentionChunk; }

// Work for n_threads, each of which begins with an even share of the list (SharedRanges).
std::vector<AttentionUnit> attention_work(const std::vector<Part>& parts, int64_t n_kv_heads, int n_threads);

}  // namespace qq
