// A GGUF file, memory-mapped and checked from end to end before anything points into it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "quant_types.h"

namespace qq {

enum GgufValueType : uint32_t {
    kU8, kI8, kU16, kI16, kU32, kI32, kF32Value, kBool, kString, kArray, kU64, kI64, kF64Value,
};

// Bytes of a fixed-size value, 0 for strings, arrays and unknown types.
uint32_t scalar_size(uint32_t value_type);

struct GgufValue {
    uint32_t type = kU8;
    const uint8_t* data = nullptr;  // a scalar, or the packed elements of an array of scalars
    std::string_view text;          // type == kString
    uint32_t element_type = kU8;    // type == kArray, with `count` elements
    uint64_t count = 0;
    std::vector<std::string_view> strings;  // an array of strings
    std::vector<GgufValue> nested;          // an array of arrays
};

struct GgufTensor {
    std::string name;
    uint32_t type;
    std::vector<int64_t> shape;  // outermost first, so a weight matrix is [N, K]
    uint64_t offset;             // from the start of the file
    uint64_t nbytes;
    const uint8_t* data;
};

class GgufFile {
public:
    explicit GgufFile(const std::string& path);
    ~GgufFile();
    GgufFile(const GgufFile&) = delete;
    GgufFile& operator=(const GgufFile&) = delete;

    const std::string& path() const { return path_; }
    uint32_t version() const { return version_; }
    uint64_t size() const { return size_; }
    uint64_t alignment() const { return alignment_; }
    const std::vector<std::pair<std::string, GgufValue>>& metadata() const { return metadata_; }
    const std::vector<GgufTensor>& tensors() const { return tensors_; }

    const GgufValue* find(const std::string& key) const;
    const GgufTensor* find_tensor(const std::string& name) const;

    // Typed access for the model's configuration; a wrong type is a FormatError naming the key.
    bool has(const std::string& key) const { return find(key) != nullptr; }
    int64_t get_int(const std::string& key) const;
    bool get_bool(const std::string& key) const;
    double get_float(const std::string& key) const;
    std::string get_string(const std::string& key) const;
    std::vector<float> get_floats(const std::string& key) const;   // an array of F32
    std::vector<int32_t> get_ints(const std::string& key) const;  // an array of I32

    // Gives back the memory of the pages that lie wholly within [begin, begin + n) of the mapping. They can still be
    // read, and are then loaded again.
    void release(const uint8_t* begin, size_t n) const;

    // Has the system read these bytes before they are touched, in larger requests than page faults make.
    void will_need(const uint8_t* begin, size_t n) const;

    // "<path>: <what>: <problem>; <remedy>"
    [[noreturn]] void fail(const std::string& what, const std::string& problem, const std::string& remedy) const;

private:
    void map_file();
    void unmap();
    void parse();
    void place_tensors(uint64_t header_end);

    std::string path_;
    const uint8_t* base_ = nullptr;
    uint64_t size_ = 0;
    uint32_t version_ = 0;
    uint64_t alignment_ = 32;
    std::vector<std::pair<std::string, GgufValue>> metadata_;
    std::unordered_map<std::string, size_t> key_index_;
    std::vector<GgufTensor> tensors_;
    std::unordered_map<std::string, size_t> tensor_index_;
};

}  // namespace qq
