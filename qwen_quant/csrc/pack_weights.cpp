#include "pack_weights.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "large_pages.h"
#include "packed.h"

namespace qq {

namespace {

constexpr size_t kReadAhead = 16;  // pieces that the system is asked for before they are packed

// Rows of q, k and v are divided among threads by whole heads, so a head has to be whole groups.
// A matrix smaller than a group is left alone: packed, it would only grow.
bool worth_packing(const Matrix& m, int64_t unit, const Kernels& kernels) {
    return kernels.types[m.type].matmul_packed && can_pack(m.type) && m.rows >= kernels.lanes &&
           unit % kernels.lanes == 0;
}

std::vector<Matrix*> matrices_to_pack(Model& model, const Kernels& kernels) {
    std::vector<Matrix*> found;
    const auto consider = [&](Matrix& m, int64_t unit) {
        if (worth_packing(m, unit, kernels)) found.push_back(&m);
    };
    for (Layer& layer : model.layers) {
        for (Matrix* m : {&layer.q, &layer.k, &layer.v}) consider(*m, model.config.head_dim);
        consider(layer.o, kernels.lanes);
        const auto consider_mlp = [&](Mlp& mlp) {
            for (Matrix* m : {&mlp.gate, &mlp.up, &mlp.down}) consider(*m, kernels.lanes);
        };
        consider_mlp(layer.mlp);
        consider_mlp(layer.shared_expert);
        for (Mlp& expert : layer.experts) consider_mlp(expert);
    }
    consider(model.head, kernels.lanes);
    return found;
}

// Bytes of a matrix once it is packed, in whole cache lines.
size_t packed_size(const Matrix& m, const Kernels& kernels) {
    return (packed_bytes(m.rows, packed_row_bytes(m.type, m.cols), kernels.lanes) + 63) / 64 * 64;
}

// What a thread packs at a time: so little that the file's pages need not be in memory beside the packed copy for long.
struct Piece {
    const Matrix* matrix;
    Range rows;
    uint8_t* out;  // of the matrix

    const uint8_t* begin() const { return matrix->data + static_cast<size_t>(rows.begin) * matrix->row_bytes; }
    size_t bytes() const { return static_cast<size_t>(rows.end - rows.begin) * matrix->row_bytes; }
};

// In the order of the file, so that it is read from one end to the other.
std::vector<Piece> pieces_of(const std::vector<Matrix*>& matrices, const Kernels& kernels, uint8_t* out) {
    constexpr int64_t kPiece = int64_t{1} << 20;  // bytes, about
    std::vector<Piece> pieces;
    for (const Matrix* m : matrices) {
        const int64_t groups = kPiece / (static_cast<int64_t>(m->row_bytes) * kernels.lanes);
        const int64_t step = std::max<int64_t>(groups, 1) * kernels.lanes;
        for (int64_t r = 0; r < m->rows; r += step) pieces.push_back({m, {r, std::min(r + step, m->rows)}, out});
        out += packed_size(*m, kernels);
    }
    std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.begin() < b.begin(); });
    return pieces;
}

void pack_piece(const Piece& piece, const GgufFile& file, const Kernels& kernels) {
    const Matrix& m = *piece.matrix;
    const size_t to_row_bytes = packed_row_bytes(m.type, m.cols);
    const PlainRows plain{m.data, m.rows, m.row_bytes};
    for (int64_t r = piece.rows.begin; r < piece.rows.end; r += kernels.lanes) {
        pack_group(m.type, plain, r, kernels.lanes, kernels.types[m.type].pack_flip,
                   piece.out + static_cast<size_t>(r) * to_row_bytes);
    }
    file.release(piece.begin(), piece.bytes());
}

}  // namespace

Buffer pack_weights(Model& model, const GgufFile& file, const Kernels& kernels, ThreadTeam& team) {
    const bool tied = model.head.data == model.embedding.data;
    const std::vector<Matrix*> matrices = matrices_to_pack(model, kernels);
    size_t total = 0;
    for (const Matrix* m : matrices) total += packed_size(*m, kernels);
    if (total == 0) return Buffer();
    Buffer memory(total);
    advise_large_pages(memory);

    const std::vector<Piece> pieces = pieces_of(matrices, kernels, memory.data());
    for (size_t i = 0; i < std::min(kReadAhead, pieces.size()); ++i) file.will_need(pieces[i].begin(), pieces[i].bytes());
    std::atomic<size_t> next{0};
    team.run([&](int) {
        for (size_t i; (i = next.fetch_add(1)) < pieces.size();) {
            const size_t ahead = i + kReadAhead;
            if (ahead < pieces.size()) file.will_need(pieces[ahead].begin(), pieces[ahead].bytes());
            pack_piece(pieces[i], file, kernels);
        }
    });
    uint8_t* out = memory.data();
    for (Matrix* m : matrices) {
        // Once more: the system may have mapped what was released again, around a page that was read later.
        file.release(m->data, static_cast<size_t>(m->rows) * m->row_bytes);
        m->data = out;
        out += packed_size(*m, kernels);
        m->row_bytes = packed_row_bytes(m->type, m->cols);
        m->packed = true;
    }
    if (tied) model.embedding = model.head;
    return memory;
}

}  // namespace qq
