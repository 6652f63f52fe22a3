#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace qq {

void bind_gguf(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);

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
