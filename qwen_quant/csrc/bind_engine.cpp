#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <mutex>

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

// Between chunks Python may run its signal handlers, so that Ctrl-C ends a long prompt.
FloatArray forward(Engine& engine, const Tokens& tokens, int64_t n_past, bool all_logits) {
    const int64_t n = static_cast<int64_t>(tokens.shape(0));
    const size_t n_vocab = static_cast<size_t>(engine.config().n_vocab);
    const auto request = begin_request(engine);
    engine.begin(tokens.data(), n, n_past);
    FloatArray logits = all_logits ? new_floats({static_cast<size_t>(n), n_vocab}) : new_floats({n_vocab});
    for (int64_t done = 0; done < n;) {
        const int64_t take = std::min(Engine::kChunk, n - done);
        const bool last = done + take == n;
        const Logits which = all_logits ? Logits::kAll : last ? Logits::kLast : Logits::kNone;
        float* out = logits.data() + (all_logits ? static_cast<size_t>(done) * n_vocab : 0);
        {
            nb::gil_scoped_release release;
            engine.step(tokens.data() + done, take, which, out);
        }
        done += take;
        if (PyErr_CheckSignals() != 0) nb::raise_python_error();
    }
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
        .def("forward", &forward, nb::arg("tokens"), nb::arg("n_past"), nb::arg("all_logits") = false,
             "Appends tokens after the first n_past of the context; logits [V] of the last, or [T, V] of all.")
        .def("truncate", [](Engine& e, int64_t n_tokens) {
            const auto request = begin_request(e);
            e.truncate(n_tokens);
        }, nb::arg("n_tokens"))
        .def("reset", [](Engine& e) {
            const auto request = begin_request(e);
            e.reset();
        })
        .def("read_kv", &read_kv, nb::arg("layer"), nb::arg("n_tokens"),
             "Keys and values of a layer's first n_tokens, as restore_kv takes them.")
        .def("restore_kv", &restore_kv, nb::arg("n_tokens"), nb::arg("layers"),
             "Makes n_tokens the context, from the bytes of each layer.")
        .def_prop_ro("n_past", &Engine::n_past)
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
        .def_prop_ro("scratch_bytes", &Engine::scratch_bytes);
}

}  // namespace qq
