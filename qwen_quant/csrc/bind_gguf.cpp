#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <memory>

#include "bind.h"
#include "error.h"
#include "gguf.h"

namespace nb = nanobind;

namespace qq {

namespace {

template <class T>
T load(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

nb::object scalar(uint32_t type, const uint8_t* p) {
    switch (type) {
        case kU8: return nb::int_(load<uint8_t>(p));
        case kI8: return nb::int_(load<int8_t>(p));
        case kU16: return nb::int_(load<uint16_t>(p));
        case kI16: return nb::int_(load<int16_t>(p));
        case kU32: return nb::int_(load<uint32_t>(p));
        case kI32: return nb::int_(load<int32_t>(p));
        case kF32Value: return nb::float_(load<float>(p));
        case kBool: return nb::bool_(load<uint8_t>(p) != 0);
        case kU64: return nb::int_(load<uint64_t>(p));
        case kI64: return nb::int_(load<int64_t>(p));
        default: return nb::float_(load<double>(p));
    }
}

nb::object to_python(const GgufValue& value) {
    if (value.type == kString) return to_str(value.text);
    if (value.type != kArray) return scalar(value.type, value.data);
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(value.count));
    if (!list) nb::raise_python_error();
    nb::object owner = nb::steal(list);
    const uint32_t size = scalar_size(value.element_type);
    for (uint64_t i = 0; i < value.count; ++i) {
        nb::object item = value.element_type == kString  ? to_str(value.strings[i])
                          : value.element_type == kArray ? to_python(value.nested[i])
                                                         : scalar(value.element_type, value.data + i * size);
        if (!item.is_valid()) nb::raise_python_error();
        PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), item.release().ptr());
    }
    return owner;
}

nb::list keys(const GgufFile& file) {
    nb::list result;
    for (const auto& [key, value] : file.metadata()) result.append(to_str(key));
    return result;
}

nb::object value(const GgufFile& file, nb::str key) {
    const nb::bytes name = nb::steal<nb::bytes>(PyUnicode_AsEncodedString(key.ptr(), "utf-8", "surrogateescape"));
    if (!name.is_valid()) nb::raise_python_error();
    const GgufValue* found = file.find(std::string(name.c_str(), name.size()));
    if (!found) throw nb::key_error(nb::repr(key).c_str());
    return to_python(*found);
}

nb::tuple shape_of(const GgufTensor& tensor) {
    nb::list dims;
    for (int64_t d : tensor.shape) dims.append(d);
    return nb::tuple(dims);
}

nb::list tensors(const GgufFile& file) {
    nb::list result;
    for (const GgufTensor& t : file.tensors()) {
        result.append(nb::make_tuple(to_str(t.name), type_info(t.type)->name, shape_of(t), t.offset, t.nbytes));
    }
    return result;
}

using Bytes = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;

Bytes raw(nb::handle_t<GgufFile> self, const std::string& name) {
    const GgufFile& file = nb::cast<const GgufFile&>(self);
    const GgufTensor* tensor = file.find_tensor(name);
    if (!tensor) file.fail("tensor '" + name + "'", "missing", "export the file again from a complete checkpoint");
    return Bytes(tensor->data, {static_cast<size_t>(tensor->nbytes)}, self);
}

}  // namespace

void bind_gguf(nb::module_& m) {
    nb::class_<GgufFile>(m, "GGUF", "A GGUF file (v2, v3), mapped and checked. Raises FormatError.")
        .def("__init__", [](GgufFile* self, nb::handle path) { new (self) GgufFile(file_path(path)); },
             nb::arg("path"))
        .def_prop_ro("path", [](const GgufFile& f) { return nb::steal(PyUnicode_DecodeFSDefault(f.path().c_str())); })
        .def_prop_ro("version", &GgufFile::version)
        .def_prop_ro("size", &GgufFile::size)
        .def_prop_ro("alignment", &GgufFile::alignment)
        .def("keys", &keys, "The metadata's keys, in their order.")
        .def("value", &value, nb::arg("key"), "The value of a key, made anew each time; raises KeyError.")
        .def("tensors", &tensors, "(name, type, shape with the outermost dimension first, offset, bytes) of each.")
        .def("raw", &raw, nb::arg("name"), "The stored bytes of a tensor, without a copy.");
}

}  // namespace qq
