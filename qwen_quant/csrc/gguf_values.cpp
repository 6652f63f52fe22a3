// Typed reading of single metadata values.
#include <cstring>
#include <string>

#include "gguf.h"

namespace qq {

namespace {

const char* const kExportAgain = "export the file again with complete metadata";

template <class T>
T load(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

const GgufValue& required(const GgufFile& file, const std::string& key) {
    const GgufValue* value = file.find(key);
    if (!value) file.fail("key '" + key + "'", "missing", kExportAgain);
    return *value;
}

template <class T>
std::vector<T> array_of(const GgufFile& file, const std::string& key, uint32_t element_type, const char* kind) {
    const GgufValue& value = required(file, key);
    if (value.type != kArray || (value.element_type != element_type && value.count > 0)) {
        file.fail("key '" + key + "'", std::string("not an array of ") + kind, kExportAgain);
    }
    std::vector<T> out(value.count);
    if (value.count > 0) std::memcpy(out.data(), value.data, value.count * sizeof(T));
    return out;
}

}  // namespace

int64_t GgufFile::get_int(const std::string& key) const {
    const GgufValue& value = required(*this, key);
    switch (value.type) {
        case kU8: return load<uint8_t>(value.data);
        case kI8: return load<int8_t>(value.data);
        case kU16: return load<uint16_t>(value.data);
        case kI16: return load<int16_t>(value.data);
        case kU32: return load<uint32_t>(value.data);
        case kI32: return load<int32_t>(value.data);
        case kI64: return load<int64_t>(value.data);
        case kU64: {
            const uint64_t wide = load<uint64_t>(value.data);
            if (wide > INT64_MAX) fail("key '" + key + "'", "value out of range", kExportAgain);
            return static_cast<int64_t>(wide);
        }
        default: fail("key '" + key + "'", "not an integer", kExportAgain);
    }
}

bool GgufFile::get_bool(const std::string& key) const {
    const GgufValue& value = required(*this, key);
    if (value.type != kBool) fail("key '" + key + "'", "not a boolean", kExportAgain);
    return *value.data != 0;
}

double GgufFile::get_float(const std::string& key) const {
    const GgufValue& value = required(*this, key);
    if (value.type == kF32Value) return load<float>(value.data);
    if (value.type == kF64Value) return load<double>(value.data);
    return static_cast<double>(get_int(key));
}

std::string GgufFile::get_string(const std::string& key) const {
    const GgufValue& value = required(*this, key);
    if (value.type != kString) fail("key '" + key + "'", "not a string", kExportAgain);
    return std::string(value.text);
}

std::vector<float> GgufFile::get_floats(const std::string& key) const {
    return array_of<float>(*this, key, kF32Value, "F32");
}

std::vector<int32_t> GgufFile::get_ints(const std::string& key) const {
    return array_of<int32_t>(*this, key, kI32, "I32");
}

}  // namespace qq
