// Memory aligned to cache lines, uninitialised.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace qq {

class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t bytes) : bytes_((bytes + 63) / 64 * 64) {
        data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, bytes_ ? bytes_ : 64)));
        if (!data_) throw std::bad_alloc();
    }

    size_t bytes() const { return bytes_; }
    uint8_t* data() const { return data_.get(); }
    template <class T>
    T* as() const { return reinterpret_cast<T*>(data_.get()); }

private:
    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };
    std::unique_ptr<uint8_t, Free> data_;
    size_t bytes_ = 0;
};

}  // namespace qq
