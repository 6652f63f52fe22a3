#include <nanobind/stl/string.h>

#include <string>

#include "bind.h"
#include "error.h"
#include "probe.h"

namespace nb = nanobind;

namespace qq {

namespace {

int checked_threads(int n_threads) {
    if (n_threads < 1 || n_threads > 1024) {
        throw RunError("n_threads " + std::to_string(n_threads) + " is out of range; use 1 to 1024");
    }
    return n_threads;
}

}  // namespace

void bind_probe(nb::module_& m) {
    nb::class_<MemoryProbe>(m, "MemoryProbe", "Measures how fast memory can be read, with memory of its own.")
        .def("__init__",
             [](MemoryProbe* self, int n_threads, size_t n_bytes) {
                 const int checked = checked_threads(n_threads);
                 const nb::gil_scoped_release release;
                 new (self) MemoryProbe(checked, n_bytes);
             },
             nb::arg("n_threads"), nb::arg("n_bytes"))
        .def("read", &MemoryProbe::read, nb::call_guard<nb::gil_scoped_release>(),
             "Reads all of the memory once; bytes per second.")
        .def_prop_ro("n_bytes", &MemoryProbe::bytes);
    m.def("int8_rate",
          [](int n_threads) {
              const int checked = checked_threads(n_threads);
              const nb::gil_scoped_release release;
              return int8_rate(checked);
          },
          nb::arg("n_threads"), "Multiplications and additions of int8 numbers per second, at most.");
    m.def("fastest_thread_count",
          [](int most) {
              const int checked = most == 0 ? usable_cpus() : checked_threads(most);
              const nb::gil_scoped_release release;
              return fastest_thread_count(checked);
          },
          nb::arg("most") = 0,
          "The number of threads, of up to `most` (0: the CPUs that may be used), that an engine takes by default.");
    m.def("int8_instructions", &int8_instructions, "The instructions that int8_rate uses.");
}

}  // namespace qq
