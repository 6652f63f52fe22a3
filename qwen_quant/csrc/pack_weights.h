// Packing a model's weights for the kernels when it is loaded.
#pragma once

#include "buffer.h"
#include "gguf.h"
#include "kernels.h"
#include "model.h"
#include "threads.h"

namespace qq {

// Packs every matrix that the kernels multiply faster that way, points the model at the packed rows, and gives back
// the file's pages as they are consumed, so that memory holds about one copy. Returns the memory they are in.
Buffer pack_weights(Model& model, const GgufFile& file, const Kernels& kernels, ThreadTeam& team);

}  // namespace qq
