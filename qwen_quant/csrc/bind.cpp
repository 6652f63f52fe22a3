// The Python module qwen_quant._core.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <cstring>

#include "bind.h"
#include "error.h"

namespace nb = nanobind;

namespace {

// Raises a class of qwen_quant.errors, which Python code can catch without knowing about this module.
// Names out of a damaged file need not be UTF-8; what is not is shown escaped.
void raise(const char* class_name, const std::exception& error) {
    try {
        const nb::object type = nb::module_::import_("qwen_quant.errors").attr(class_name);
        const nb::object text = nb::steal(PyUnicode_DecodeUTF8(
            error.what(), static_cast<Py_ssize_t>(std::strlen(error.what())), "backslashreplace"));
        if (text.is_valid()) PyErr_SetObject(type.ptr(), text.ptr());
    } catch (nb::python_error& failure) {
        failure.restore();
    }
}

void translate(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const qq::FormatError& error) {
        raise("FormatError", error);
    } catch (const qq::RunError& error) {
        raise("QwenQuantError", error);
    }
}

}  // namespace

NB_MODULE(_core, m) {
    m.doc() = "GGUF reading, CPU kernels and the inference engine of qwen-quant.";
    nb::register_exception_translator(translate);
    qq::bind_gguf(m);
    qq::bind_engine(m);
    qq::bind_kernels(m);
    qq::bind_grids(m);
    qq::bind_probe(m);
    qq::bind_vocabulary(m);
}
