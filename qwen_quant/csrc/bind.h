#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <string_view>

namespace qq {

void bind_gguf(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);
void bind_grids(nanobind::module_& m);
void bind_probe(nanobind::module_& m);
void bind_vocabulary(nanobind::module_& m);

// str, bytes or os.PathLike as the bytes that the file system wants.
inline std::string file_path(nanobind::handle path) {
    PyObject* encoded = nullptr;
    if (!PyUnicode_FSConverter(path.ptr(), &encoded)) nanobind::raise_python_error();
    const nanobind::bytes owner = nanobind::steal<nanobind::bytes>(encoded);
    return std::string(owner.c_str(), owner.size());
}

// Bytes that are not UTF-8 become lone surrogates, as in os.fsdecode.
inline nanobind::object to_str(std::string_view text) {
    return nanobind::steal(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogateescape"));
}

// A new array of float that owns its memory.
using FloatArray = nanobind::ndarray<nanobind::numpy, float>;
inline FloatArray new_floats(std::initializer_list<size_t> shape) {
    size_t n = 1;
    for (size_t s : shape) n *= s;
    float* data = new float[n ? n : 1];
    nanobind::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    return FloatArray(data, shape, owner);
}

}  // namespace qq
