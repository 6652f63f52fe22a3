// The Python module qwen_quant._core.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "bind.h"
#include "error.h"

namespace nb = nanobind;

namespace {

// Raises a class of qwen_quant.errors, which Python code can catch without knowing about this module.
void raise(const char* class_name, const std::exception& error) {
    try {
        const nb::object type = nb::module_::import_("qwen_quant.errors").attr(class_name);
        PyErr_SetString(type.ptr(), error.what());
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
}
