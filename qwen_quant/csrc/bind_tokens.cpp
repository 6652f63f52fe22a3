#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bind.h"
#include "byte_pairs.h"

namespace nb = nanobind;

namespace qq {

void bind_tokens(nb::module_& m) {
    nb::class_<BytePairs>(m, "BytePairs", "Byte-pair encoding by a vocabulary and ranked merges.")
        .def(nb::init<const std::vector<std::string_view>&, const std::vector<std::string_view>&,
                      const std::vector<int32_t>&>(),
             nb::arg("tokens"), nb::arg("merges"), nb::arg("absent"))
        .def("id_of",
             [](const BytePairs& pairs, std::string_view spelling) {
                 const int32_t id = pairs.id_of(spelling);
                 return id < 0 ? std::nullopt : std::optional<int32_t>(id);
             },
             nb::arg("spelling"))
        .def("encode",
             [](const BytePairs& pairs, const std::vector<std::string_view>& words) {
                 std::vector<int32_t> ids;
                 for (const std::string_view word : words) pairs.encode(word, ids);
                 return ids;
             },
             nb::arg("words"), "The ids of words, one after the other.");
}

}  // namespace qq
