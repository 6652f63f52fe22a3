#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <vector>

#include "bind.h"
#include "vocabulary.h"

namespace nb = nanobind;

namespace qq {

namespace {

std::string_view utf8(nb::handle text) {
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (!data) nb::raise_python_error();
    return {data, static_cast<size_t>(size)};
}

// Of a list of str; raises TypeError for one of something else, UnicodeEncodeError for lone surrogates.
void make_strings(Strings* self, const nb::sequence& items) {
    std::string text;
    std::vector<size_t> lengths;
    for (const nb::handle item : items) {
        const std::string_view part = utf8(item);
        text.append(part);
        lengths.push_back(part.size());
    }
    new (self) Strings(std::move(text), lengths);
}

nb::object string_at(const Strings& strings, int64_t index) {
    if (index < 0) index += static_cast<int64_t>(strings.size());
    if (index < 0 || index >= static_cast<int64_t>(strings.size())) throw nb::index_error();
    return to_str(strings[static_cast<size_t>(index)]);
}

nb::list places(const Strings& strings, nb::str text) {
    const std::string_view wanted = utf8(text);
    nb::list found;
    for (size_t i = 0; i < strings.size(); ++i) {
        if (strings[i] == wanted) found.append(i);
    }
    return found;
}

nb::list covered(const Strings& strings, const ByteTriples& triples) {
    nb::list found;
    for (size_t i = 0; i < strings.size(); ++i) {
        if (triples.cover(strings[i])) found.append(i);
    }
    return found;
}

void check_merges(const Strings& merges, const Strings& tokens, const nb::bytes& is_token) {
    if (is_token.size() != tokens.size()) throw nb::value_error("is_token has another length than tokens");
    const char* flags = is_token.c_str();
    const std::string bad = find_bad_merge(merges, tokens, std::vector<bool>(flags, flags + is_token.size()));
    if (!bad.empty()) throw nb::value_error(bad.c_str());
}

}  // namespace

void bind_vocabulary(nb::module_& m) {
    nb::class_<Strings>(m, "Strings", "Many strings, of which a str is made when it is asked for.")
        .def("__init__", &make_strings, nb::arg("items"))
        .def(nb::init<std::shared_ptr<GgufFile>, const std::string&>(), nb::arg("file"), nb::arg("key"),
             "Those that a file has under a key; raises FormatError without them.")
        .def("__len__", &Strings::size)
        .def("__getitem__", &string_at, nb::arg("index"))
        .def("__iter__", [](nb::handle self) { return nb::steal(PySeqIter_New(self.ptr())); })
        .def("places", &places, nb::arg("text"), "The indices at which `text` stands.")
        .def("covered", &covered, nb::arg("triples"), "The indices of what `triples` covers.");
    nb::class_<ByteTriples>(m, "ByteTriples", "Which three bytes follow one another in texts, spelled byte by byte.")
        .def(nb::init<>())
        .def("add", [](ByteTriples& t, nb::str spelled) { return t.add(utf8(spelled)); }, nb::arg("spelled"),
             "Adds those of a text; whether any is new.");
    m.def("check_merges", &check_merges, nb::arg("merges"), nb::arg("tokens"), nb::arg("is_token"),
          "Raises ValueError for the first merge of which a half or the whole is no token; is_token has a byte for each.");
}

}  // namespace qq
