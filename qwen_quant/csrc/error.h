// The two kinds of failure that reach Python; bind.cpp maps them to qwen_quant.errors.
#pragma once

#include <stdexcept>
#include <string>

namespace qq {

// The file is not what it should be. The message names the file, the tensor or key, and the remedy.
struct FormatError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A request that cannot be served: a token out of range, a context that is full, a non-finite activation.
struct RunError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace qq
