#include "pack_weights.h"

#include "large_pages.h"
#include "packed.h"

namespace qq {

namespace {

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

// The rows in pieces, so that little of the file is in memory beside the packed copy.
void pack_rows(const Matrix& m, Range rows, const GgufFile& file, const Kernels& kernels, uint8_t* out) {
    const size_t to_row_bytes = packed_row_bytes(m.type, m.cols);
    constexpr size_t kPiece = size_t{1} << 20;
    const PlainRows plain{m.data, m.rows, m.row_bytes};
    const uint8_t* consumed = m.data + static_cast<size_t>(rows.begin) * m.row_bytes;
    for (int64_t r = rows.begin; r < rows.end; r += kernels.lanes) {
        pack_group(m.type, plain, r, kernels.lanes, kernels.types[m.type].pack_flip,
                   out + static_cast<size_t>(r) * to_row_bytes);
        const int64_t done = r + kernels.lanes < rows.end ? r + kernels.lanes : rows.end;
        const uint8_t* here = m.data + static_cast<size_t>(done) * m.row_bytes;
        if (done == rows.end || static_cast<size_t>(here - consumed) >= kPiece) {
            file.release(consumed, static_cast<size_t>(here - consumed));
            consumed = here;
        }
    }
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

    team.run([&](int id) {
        uint8_t* out = memory.data();
        for (const Matrix* m : matrices) {
            pack_rows(*m, share(m->rows, id, team.size(), kernels.lanes), file, kernels, out);
            out += packed_size(*m, kernels);
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
