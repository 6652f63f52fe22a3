// The quantizer's inner loops (grid_kernels.h) for NumPy arrays, which torch tensors on the CPU can be seen as.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "error.h"
#include "grid_kernels.h"

namespace nb = nanobind;

namespace qq {

namespace {

template <class T>
using Stack = nb::ndarray<T, nb::ndim<3>, nb::device::cpu>;

template <class T>
void check_shape(const Stack<T>& array, const char* name, const Stack<float>& like, size_t last) {
    if (array.shape(0) != like.shape(0) || array.shape(1) != like.shape(1) || array.shape(2) != last) {
        throw RunError(std::string(name) + " does not fit the columns [E, M, N]");
    }
}

template <class T>
void check(const Stack<T>& array, const char* name, const Stack<float>& like) {
    check_shape(array, name, like, like.shape(2));
    if (array.shape(2) > 1 && array.stride(2) != 1) {
        throw RunError(std::string("in ") + name + " the rows of a column do not lie side by side");
    }
}

void check_strides(const Stack<const float>& scale, const Stack<const float>& offset) {
    if (scale.stride(1) != offset.stride(1)) throw RunError("scale and offset have different strides");
}

Rule rule_of(const std::string& name) {
    if (name == "centred") return Rule::kCentred;
    if (name == "minimum") return Rule::kMinimum;
    if (name == "levels") return Rule::kLevels;
    throw RunError("a grid's rule cannot be '" + name + "'");
}

// A grid as Python describes it: (rule, max_code, levels, nearest codes).
struct Grid {
    Rule rule;
    float max_code;
    std::vector<float> levels, nearest;

    Grid(const std::string& name, int max_code, std::vector<float> levels, std::vector<float> nearest)
        : rule(rule_of(name)), max_code(static_cast<float>(max_code)), levels(std::move(levels)),
          nearest(std::move(nearest)) {
        if (max_code < 1 || max_code > 255) throw RunError("a grid's max_code must lie between 1 and 255");
        if (rule == Rule::kLevels &&
            (this->levels.size() != static_cast<size_t>(max_code) + 1 ||
             static_cast<float>(this->nearest.size()) != (this->levels.back() - this->levels.front()) * 2 + 1)) {
            throw RunError("a grid's levels and nearest codes do not fit together");
        }
    }

    Codes codes() const { return {max_code, levels.data(), nearest.data()}; }
};

using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

GroupsArgs groups_args(const Rows& w, const Rows& importance, const Rows& scale, const Rows& offset) {
    if (importance.shape(0) != w.shape(0) || importance.shape(1) != w.shape(1) || scale.shape(0) != w.shape(0) ||
        offset.shape(0) != w.shape(0) || offset.shape(1) != scale.shape(1)) {
        throw RunError("groups [M, S], importance [M, S], scale and offset [M, C] do not fit together");
    }
    return {static_cast<int64_t>(w.shape(0)), static_cast<int64_t>(w.shape(1)), static_cast<int64_t>(scale.shape(1)),
            w.data(), importance.data(), scale.data(), offset.data()};
}

FloatArray group_errors(const Grid& grid, const Rows& w, const Rows& importance, const Rows& scale,
                        const Rows& offset) {
    const GroupsArgs args = groups_args(w, importance, scale, offset);
    FloatArray errors = new_floats({scale.shape(0), scale.shape(1)});
    const nb::gil_scoped_release release;
    grid_kernels().group_errors(grid.rule, grid.codes(), args, errors.data());
    return errors;
}

FloatArray group_sums(const Grid& grid, const Rows& w, const Rows& importance, const Rows& scale,
                      const Rows& offset) {
    const GroupsArgs args = groups_args(w, importance, scale, offset);
    FloatArray found = new_floats({5, scale.shape(0), scale.shape(1)});
    const int64_t step = args.groups * args.candidates;
    float* const sums[] = {found.data(), found.data() + step, found.data() + 2 * step, found.data() + 3 * step,
                           found.data() + 4 * step};
    const nb::gil_scoped_release release;
    grid_kernels().group_sums(grid.rule, grid.codes(), args, sums);
    return found;
}

void round_columns(const Grid& grid, Stack<float> target, Stack<const float> scale, Stack<const float> offset,
                   Stack<const float> spread, Stack<const float> w, Stack<uint8_t> codes, Stack<float> error) {
    check(target, "target", target);
    check(scale, "scale", target);
    check(offset, "offset", target);
    check_shape(spread, "spread", target, target.shape(1));
    check(w, "w", target);
    check(codes, "codes", target);
    check(error, "error", target);
    check_strides(scale, offset);
    const nb::gil_scoped_release release;
    for (size_t e = 0; e < target.shape(0); ++e) {
        const int64_t i = static_cast<int64_t>(e);
        grid_kernels().round_columns(
            grid.rule, grid.codes(),
            {static_cast<int64_t>(target.shape(1)), static_cast<int64_t>(target.shape(2)),
             target.data() + i * target.stride(0), target.stride(1), scale.data() + i * scale.stride(0),
             offset.data() + i * offset.stride(0), scale.stride(1), spread.data() + i * spread.stride(0),
             spread.stride(1), spread.stride(2), w.data() + i * w.stride(0), w.stride(1),
             codes.data() + i * codes.stride(0), codes.stride(1), error.data() + i * error.stride(0),
             error.stride(1)});
    }
}

void descend_columns(const Grid& grid, Stack<const float> hessian, Stack<const float> scale, Stack<const float> offset,
                     Stack<float> pull, Stack<uint8_t> codes, Stack<float> error) {
    check(pull, "pull", pull);
    check_shape(hessian, "hessian", pull, pull.shape(1));
    if (hessian.shape(2) > 1 && hessian.stride(2) != 1) throw RunError("the columns of hessian do not lie side by side");
    check(scale, "scale", pull);
    check(offset, "offset", pull);
    check(codes, "codes", pull);
    check(error, "error", pull);
    check_strides(scale, offset);
    const nb::gil_scoped_release release;
    for (size_t e = 0; e < pull.shape(0); ++e) {
        const int64_t i = static_cast<int64_t>(e);
        grid_kernels().descend_columns(
            grid.rule, grid.codes(),
            {static_cast<int64_t>(pull.shape(1)), static_cast<int64_t>(pull.shape(2)),
             hessian.data() + i * hessian.stride(0), hessian.stride(1), scale.data() + i * scale.stride(0),
             offset.data() + i * offset.stride(0), scale.stride(1), pull.data() + i * pull.stride(0), pull.stride(1),
             codes.data() + i * codes.stride(0), codes.stride(1), error.data() + i * error.stride(0),
             error.stride(1)});
    }
}

}  // namespace

void bind_grids(nb::module_& m) {
    nb::class_<Grid>(m, "GridCodes", "How the codes of a grid stand for values (grid_kernels.h).")
        .def(nb::init<const std::string&, int, std::vector<float>, std::vector<float>>(), nb::arg("rule"),
             nb::arg("max_code"), nb::arg("levels") = std::vector<float>(),
             nb::arg("nearest") = std::vector<float>());
    m.def("group_errors", &group_errors, nb::arg("grid"), nb::arg("w"), nb::arg("importance"), nb::arg("scale"),
          nb::arg("offset"), "Weighted squared errors [M, C] of groups [M, S] for scales and offsets [M, C].");
    m.def("group_sums", &group_sums, nb::arg("grid"), nb::arg("w"), nb::arg("importance"), nb::arg("scale"),
          nb::arg("offset"), "[5, M, C]: the sums of importance, and of importance times w, level, level squared, and level times w.");
    m.def("round_columns", &round_columns, nb::arg("grid"), nb::arg("target"), nb::arg("scale"), nb::arg("offset"),
          nb::arg("spread"), nb::arg("w"), nb::arg("codes"), nb::arg("error"),
          "Rounds columns [E, M, N] from the last to the first in place, spreading each one's error.");
    m.def("descend_columns", &descend_columns, nb::arg("grid"), nb::arg("hessian"), nb::arg("scale"),
          nb::arg("offset"), nb::arg("pull"), nb::arg("codes"), nb::arg("error"),
          "Gives columns [E, M, N], from the last to the first, the codes that are best beside the others', in place.");
}

}  // namespace qq
