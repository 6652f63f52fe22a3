#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "bind.h"
#include "engine.h"
#include "error.h"

namespace nb = nanobind;

namespace qq {

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using NewBytes = nb::ndarray<nb::numpy, uint8_t>;
using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Waits for the requests of other Python threads, which need the GIL to finish.
std::unique_lock<std::mutex> begin_request(Engine& engine) {
    const nb::gil_scoped_release release;
    return std::unique_lock<std::mutex>(engine.request());
}

// The segments' logits, one row after the other. Between chunks Python may run its signal handlers, so that Ctrl-C ends a
// long prompt.
void run_segments(Engine& engine, std::vector<Segment> left, float* logits) {
    while (!left.empty()) {
        const std::vector<Segment> chunk = Engine::next_chunk(left);
        {
            nb::gil_scoped_release release;
            engine.step(chunk, logits);
        }
        for (const Segment& s : chunk) logits += s.n_logits * engine.config().n_vocab;
        if (PyErr_CheckSignals() != 0) nb::raise_python_error();
    }
}

// Logits of the last n_logits tokens, which follow the first n_past of the context; `make_room` says where they go.
template <class MakeRoom>
void append(Engine& engine, const Tokens& tokens, int64_t n_past, int64_t n_logits, MakeRoom make_room) {
    const auto request = begin_request(engine);
    if (n_past < 0 || n_past > engine.n_past()) {
        throw RunError("n_past is " + std::to_string(n_past) + ", the context holds " + std::to_string(engine.n_past()) +
                       " tokens; pass 0 to start again");
    }
    engine.truncate(n_past);
    const std::vector<Segment> segments{{0, tokens.data(), static_cast<int64_t>(tokens.shape(0)), n_logits}};
    engine.begin(segments);
    run_segments(engine, segments, make_room());
}

FloatArray forward(Engine& engine, const Tokens& tokens, int64_t n_past, int64_t n_logits) {
    FloatArray logits;
    append(engine, tokens, n_past, n_logits, [&] {
        logits = new_floats({static_cast<size_t>(n_logits), static_cast<size_t>(engine.config().n_vocab)});
        return logits.data();
    });
    return logits;
}

// The first of the largest; no NaN is among them.
int64_t largest(const float* x, int64_t n) {
    constexpr int64_t kLanes = 16;
    float best[kLanes];
    std::fill(best, best + kLanes, x[0]);
    for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
        for (int64_t j = 0; j < kLanes; ++j) best[j] = best[j] < x[i + j] ? x[i + j] : best[j];
    }
    const float most = *std::max_element(best, best + kLanes);
    const float* rest = x + n / kLanes * kLanes;
    return std::find(x, x + n, std::max(most, rest < x + n ? *std::max_element(rest, x + n) : most)) - x;
}

int64_t most_likely(Engine& engine, const Tokens& tokens, int64_t n_past) {
    std::unique_ptr<float[]> logits;
    append(engine, tokens, n_past, 1, [&] {
        logits.reset(new float[static_cast<size_t>(engine.config().n_vocab)]);
        return logits.get();
    });
    return largest(logits.get(), engine.config().n_vocab);
}

FloatArray forward_sequences(Engine& engine, const std::vector<int64_t>& sequences, const std::vector<Tokens>& tokens,
                             int64_t n_logits) {
    const auto request = begin_request(engine);
    if (sequences.empty() || sequences.size() != tokens.size()) {
        throw RunError(std::to_string(sequences.size()) + " sequences were named for " + std::to_string(tokens.size()) +
                       " lists of tokens");
    }
    std::vector<Segment> segments;
    for (size_t i = 0; i < sequences.size(); ++i) {
        segments.push_back({sequences[i], tokens[i].data(), static_cast<int64_t>(tokens[i].shape(0)), n_logits});
    }
    engine.begin(segments);
    FloatArray logits = new_floats({sequences.size(), static_cast<size_t>(n_logits),
                                    static_cast<size_t>(engine.config().n_vocab)});
    run_segments(engine, segments, logits.data());
    return logits;
}

NewBytes read_kv(Engine& engine, int64_t layer, int64_t n_tokens) {
    const auto request = begin_request(engine);
    if (layer < 0 || layer >= engine.config().n_layers || n_tokens < 0 || n_tokens > engine.n_past()) {
        throw RunError("layer " + std::to_string(layer) + " has no " + std::to_string(n_tokens) + " tokens");
    }
    const size_t n_bytes = engine.kv_layer_bytes(layer, n_tokens);
    uint8_t* data = new uint8_t[n_bytes ? n_bytes : 1];
    const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    engine.read_kv(layer, n_tokens, data);
    return NewBytes(data, {n_bytes}, owner);
}

// Takes one layer after the other from an iterable; when that fails, the context is empty.
void restore_kv(Engine& engine, int64_t n_tokens, const nb::iterable& layers) {
    const auto request = begin_request(engine);
    engine.begin_restore(n_tokens);
    int64_t layer = 0;
    for (const nb::handle item : layers) {
        const Bytes data = nb::cast<Bytes>(item);
        if (layer == engine.config().n_layers || data.shape(0) != engine.kv_layer_bytes(layer, n_tokens)) {
            throw RunError("layer " + std::to_string(layer) + " has other sizes");
        }
        engine.restore_layer(layer++, n_tokens, data.data());
    }
    if (layer < engine.config().n_layers) throw RunError("layer " + std::to_string(layer) + " is missing");
    engine.end_restore(n_tokens);
}

using Unit = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

std::vector<Unit> units_of_attention(const std::vector<std::pair<int64_t, int64_t>>& parts, int64_t n_kv_heads,
                                     int n_threads) {
    std::vector<Part> all;
    for (const auto& [first, n_tokens] : parts) all.push_back({0, 0, n_tokens, first});
    std::vector<Unit> units;
    for (const AttentionUnit& u : attention_work(all, n_kv_heads, n_threads)) {
        units.emplace_back(u.part, u.t0, u.t1, u.kv_head, u.begin, u.end);
    }
    return units;
}

}  // namespace

void bind_engine(nb::module_& m) {
    nb::class_<Engine>(m, "Engine", "Runs the model of a GGUF file on the CPU.")
        .def("__init__",
             [](Engine* self, std::shared_ptr<GgufFile> file, int n_threads, const std::string& isa, int64_t n_ctx,
                const std::string& cache_type_k, const std::string& cache_type_v) {
                 const nb::gil_scoped_release release;  // weights take their time to pack
                 new (self) Engine(std::move(file), n_threads, isa, n_ctx, cache_type_k, cache_type_v);
             },
             nb::arg("file"), nb::arg("n_threads") = 0, nb::arg("isa") = "auto", nb::arg("n_ctx") = 0,
             nb::arg("cache_type_k") = "f16", nb::arg("cache_type_v") = "f16")
        .def("__init__",
             [](Engine* self, nb::handle path, int n_threads, const std::string& isa, int64_t n_ctx,
                const std::string& cache_type_k, const std::string& cache_type_v) {
                 auto file = std::make_shared<GgufFile>(file_path(path));
                 const nb::gil_scoped_release release;
                 new (self) Engine(std::move(file), n_threads, isa, n_ctx, cache_type_k, cache_type_v);
             },
             nb::arg("path"), nb::arg("n_threads") = 0, nb::arg("isa") = "auto", nb::arg("n_ctx") = 0,
             nb::arg("cache_type_k") = "f16", nb::arg("cache_type_v") = "f16")
        .def("forward", &forward, nb::arg("tokens"), nb::arg("n_past"), nb::arg("n_logits") = 1,
             "Appends tokens after the first n_past of the context; logits [n_logits, V] of the last ones.")
        .def("most_likely", &most_likely, nb::arg("tokens"), nb::arg("n_past"),
             "Appends tokens as forward does; the id with the largest logit, the lowest among equals.")
        .def("fork", [](Engine& e, int64_t n_sequences) {
            const auto request = begin_request(e);
            e.fork(n_sequences);
        }, nb::arg("n_sequences"),
             "Sets how many sequences there are; all hold what the first one, the context, holds. 1 forgets the others.")
        .def("forward_sequences", &forward_sequences, nb::arg("sequences"), nb::arg("tokens"), nb::arg("n_logits") = 1,
             "Appends a list of tokens to each of the sequences, in shared steps; logits [len(sequences), n_logits, V].")
        .def("truncate", [](Engine& e, int64_t n_tokens) {
            const auto request = begin_request(e);
            e.truncate(n_tokens);
        }, nb::arg("n_tokens"))
        .def("exact_past", &Engine::exact_past, nb::arg("n_tokens"),
             "The longest context of at most n_tokens that truncate goes back to exactly.")
        .def_prop_ro("exact_rewind", &Engine::exact_rewind)
        .def("reset", [](Engine& e) {
            const auto request = begin_request(e);
            e.reset();
        })
        .def("read_kv", &read_kv, nb::arg("layer"), nb::arg("n_tokens"),
             "Keys and values of a layer's first n_tokens, as restore_kv takes them.")
        .def("restore_kv", &restore_kv, nb::arg("n_tokens"), nb::arg("layers"),
             "Makes n_tokens the context, from the bytes of each layer.")
        .def_prop_ro("n_past", &Engine::n_past)
        .def_prop_ro("n_sequences", &Engine::n_sequences)
        .def_prop_ro("n_layers", [](const Engine& e) { return e.config().n_layers; })
        .def_prop_ro("kv_type", &Engine::kv_type)
        .def_prop_ro("n_vocab", [](const Engine& e) { return e.config().n_vocab; })
        .def_prop_ro("n_ctx", &Engine::n_ctx)
        .def_prop_ro("n_ctx_train", [](const Engine& e) { return e.config().context; })
        .def_prop_ro("architecture", [](const Engine& e) { return e.config().architecture; })
        .def_prop_ro("isa", [](const Engine& e) { return e.kernels().isa; })
        .def_prop_ro("n_threads", &Engine::n_threads)
        .def_prop_ro("weight_bytes", &Engine::weight_bytes)
        .def_prop_ro("kv_bytes", &Engine::kv_bytes)
        .def_prop_ro("kv_bytes_per_token", &Engine::kv_bytes_per_token)
        .def_prop_ro("kv_recent_bytes", &Engine::kv_recent_bytes)
        .def_prop_ro("scratch_bytes", &Engine::scratch_bytes);
    m.def("attention_work", &units_of_attention, nb::arg("parts"), nb::arg("n_kv_heads"), nb::arg("n_threads"),
          "How a step's attention is divided, of parts (first position, tokens): (part, t0, t1, head, begin, end).");
}

}  // namespace qq
