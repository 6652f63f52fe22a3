#include "gguf.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "error.h"

namespace qq {

namespace {

constexpr int kMaxArrayDepth = 4;
constexpr uint32_t kMaxDims = 4;
const char* const kCutRemedy = "the file is cut short or damaged: copy, download or export it again";
const char* const kDamagedRemedy = "the file is damaged or not a GGUF file: copy, download or export it again";

// Names out of a damaged file, fit for a message: short and without control characters.
std::string one_line(std::string text) {
    constexpr size_t kLongest = 200;
    if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
    for (char& c : text) {
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
    }
    return text;
}

// Reads forward through the header; every read is checked against the end of the file.
class Cursor {
public:
    Cursor(const GgufFile& file, const uint8_t* base, uint64_t size) : file_(file), base_(base), size_(size) {}

    uint64_t position() const { return position_; }
    uint64_t remaining() const { return size_ - position_; }
    void set_context(std::string what) { what_ = std::move(what); }

    const uint8_t* take(uint64_t n) {
        if (n > remaining()) {
            file_.fail(what_, "needs " + std::to_string(n) + " bytes at offset " + std::to_string(position_) +
                                  ", the file ends after " + std::to_string(remaining()), kCutRemedy);
        }
        const uint8_t* p = base_ + position_;
        position_ += n;
        return p;
    }

    template <class T>
    T read() {
        T value;
        std::memcpy(&value, take(sizeof(T)), sizeof(T));
        return value;
    }

    std::string_view read_string() {
        const uint64_t length = read<uint64_t>();
        return {reinterpret_cast<const char*>(take(length)), static_cast<size_t>(length)};
    }

    // A count of things that take at least `min_bytes` each: refused before anything is allocated for them.
    uint64_t checked_count(uint64_t count, uint64_t min_bytes, const char* of) {
        if (count > remaining() / min_bytes) {
            file_.fail(what_, "claims " + std::to_string(count) + " " + of + ", more than the file can hold",
                       kCutRemedy);
        }
        return count;
    }

    GgufValue read_value(uint32_t type, int depth) {
        GgufValue value;
        value.type = type;
        if (type == kString) {
            value.text = read_string();
        } else if (type == kArray) {
            read_array(value, depth);
        } else if (const uint32_t n = scalar_size(type)) {
            value.data = take(n);
            if (type == kBool && *value.data > 1) file_.fail(what_, "boolean that is neither 0 nor 1", kDamagedRemedy);
        } else {
            file_.fail(what_, "unknown value type " + std::to_string(type), kDamagedRemedy);
        }
        return value;
    }

private:
    void read_array(GgufValue& value, int depth) {
        if (depth >= kMaxArrayDepth) file_.fail(what_, "arrays nested too deeply", kDamagedRemedy);
        value.element_type = read<uint32_t>();
        const uint64_t count = read<uint64_t>();
        value.count = count;
        if (value.element_type == kString) {
            value.strings.reserve(checked_count(count, 8, "strings"));
            for (uint64_t i = 0; i < count; ++i) value.strings.push_back(read_string());
        } else if (value.element_type == kArray) {
            checked_count(count, 12, "arrays");
            for (uint64_t i = 0; i < count; ++i) value.nested.push_back(read_value(kArray, depth + 1));
        } else if (const uint32_t n = scalar_size(value.element_type)) {
            value.data = take(checked_count(count, n, "elements") * n);
        } else {
            file_.fail(what_, "unknown array element type " + std::to_string(value.element_type), kDamagedRemedy);
        }
    }

    const GgufFile& file_;
    const uint8_t* base_;
    uint64_t size_;
    uint64_t position_ = 0;
    std::string what_ = "header";
};

GgufTensor read_tensor_info(const GgufFile& file, Cursor& in) {
    GgufTensor tensor;
    tensor.name = std::string(in.read_string());
    const std::string what = "tensor '" + tensor.name + "'";
    if (tensor.name.empty()) file.fail("tensor list", "a tensor without a name", kDamagedRemedy);
    in.set_context(what);
    const uint32_t n_dims = in.read<uint32_t>();
    if (n_dims == 0 || n_dims > kMaxDims) {
        file.fail(what, "has " + std::to_string(n_dims) + " dimensions, 1 to 4 are possible", kDamagedRemedy);
    }
    uint64_t elements = 1;
    for (uint32_t i = 0; i < n_dims; ++i) {
        const uint64_t dim = in.read<uint64_t>();
        if (dim == 0 || dim > (uint64_t{1} << 48) / elements) {
            file.fail(what, "impossible dimension " + std::to_string(dim), kDamagedRemedy);
        }
        elements *= dim;
        tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(dim));
    }
    tensor.type = in.read<uint32_t>();
    const TypeInfo* info = type_info(tensor.type);
    if (!info) {
        file.fail(what, "unknown tensor type " + std::to_string(tensor.type),
                  "export it with one of F32, F16, BF16, Q8_0, Q4_0, Q4_1");
    }
    if (tensor.shape.back() % info->block != 0) {
        file.fail(what, "rows of " + std::to_string(tensor.shape.back()) + " elements do not divide into " +
                            info->name + " blocks of " + std::to_string(info->block), kDamagedRemedy);
    }
    tensor.offset = in.read<uint64_t>();
    tensor.nbytes = elements / info->block * info->bytes;
    tensor.data = nullptr;
    return tensor;
}

}  // namespace

uint32_t scalar_size(uint32_t value_type) {
    static const uint32_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return value_type < sizeof sizes / sizeof *sizes ? sizes[value_type] : 0;
}

GgufFile::GgufFile(const std::string& path) : path_(path) {
    map_file();
    try {
        parse();
    } catch (...) {
        unmap();
        throw;
    }
}

GgufFile::~GgufFile() { unmap(); }

void GgufFile::fail(const std::string& what, const std::string& problem, const std::string& remedy) const {
    throw FormatError(path_ + ": " + one_line(what) + ": " + one_line(problem) + "; " + remedy);
}

void GgufFile::map_file() {
    const int fd = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail("open", std::strerror(errno), "check the path and its permissions");
    struct stat info{};
    if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        ::close(fd);
        fail("open", "not a regular file", "give the path of a .gguf file");
    }
    size_ = static_cast<uint64_t>(info.st_size);
    if (size_ == 0) {
        ::close(fd);
        fail("header", "the file is empty", kCutRemedy);
    }
    void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    const int error = errno;
    ::close(fd);
    if (mapped == MAP_FAILED) fail("map", std::strerror(error), "free some address space or memory");
    base_ = static_cast<const uint8_t*>(mapped);
}

void GgufFile::unmap() {
    if (base_) ::munmap(const_cast<uint8_t*>(base_), size_);
    base_ = nullptr;
}

void GgufFile::release(const uint8_t* begin, size_t n) const {
    const uintptr_t page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
    const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + n) / page * page;
    if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

void GgufFile::will_need(const uint8_t* begin, size_t n) const {
    const uintptr_t page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
    const uintptr_t first = reinterpret_cast<uintptr_t>(begin) / page * page;
    ::madvise(reinterpret_cast<void*>(first), reinterpret_cast<uintptr_t>(begin) + n - first, MADV_WILLNEED);
}

void GgufFile::parse() {
    Cursor in(*this, base_, size_);
    if (std::memcmp(in.take(4), "GGUF", 4) != 0) fail("header", "no GGUF magic", kDamagedRemedy);
    version_ = in.read<uint32_t>();
    if (version_ != 2 && version_ != 3) {
        const bool swapped = version_ == 0x02000000u || version_ == 0x03000000u;
        fail("header", swapped ? "big-endian file" : "GGUF version " + std::to_string(version_),
             "convert it to little-endian GGUF version 3");
    }
    const uint64_t n_tensors = in.read<uint64_t>();
    const uint64_t n_keys = in.read<uint64_t>();
    in.checked_count(n_keys, 13, "metadata keys");
    in.checked_count(n_tensors, 33, "tensors");

    for (uint64_t i = 0; i < n_keys; ++i) {
        in.set_context("metadata key " + std::to_string(i));
        std::string key(in.read_string());
        in.set_context("key '" + key + "'");
        if (!key_index_.emplace(key, metadata_.size()).second) {
            fail("key '" + key + "'", "appears twice", kDamagedRemedy);
        }
        const uint32_t type = in.read<uint32_t>();
        metadata_.emplace_back(std::move(key), in.read_value(type, 0));
    }
    if (has("general.alignment")) {
        const int64_t alignment = get_int("general.alignment");
        if (alignment < 8 || alignment > (1 << 30) || (alignment & (alignment - 1)) != 0) {
            fail("key 'general.alignment'", std::to_string(alignment) + " is not a power of two from 8",
                 kDamagedRemedy);
        }
        alignment_ = static_cast<uint64_t>(alignment);
    }
    for (uint64_t i = 0; i < n_tensors; ++i) {
        in.set_context("tensor " + std::to_string(i));
        tensors_.push_back(read_tensor_info(*this, in));
        if (!tensor_index_.emplace(tensors_.back().name, i).second) {
            fail("tensor '" + tensors_.back().name + "'", "appears twice", kDamagedRemedy);
        }
    }
    place_tensors(in.position());
}

void GgufFile::place_tensors(uint64_t header_end) {
    const uint64_t data_start = (header_end + alignment_ - 1) / alignment_ * alignment_;
    const uint64_t available = size_ > data_start ? size_ - data_start : 0;
    std::vector<const GgufTensor*> order;
    for (GgufTensor& tensor : tensors_) {
        const std::string what = "tensor '" + tensor.name + "'";
        if (tensor.offset % alignment_ != 0) fail(what, "offset is not aligned", kDamagedRemedy);
        if (tensor.offset > available || tensor.nbytes > available - tensor.offset) {
            fail(what, "its " + std::to_string(tensor.nbytes) + " bytes reach past the end of the file", kCutRemedy);
        }
        tensor.offset += data_start;
        tensor.data = base_ + tensor.offset;
        order.push_back(&tensor);
    }
    std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
    for (size_t i = 1; i < order.size(); ++i) {
        if (order[i]->offset < order[i - 1]->offset + order[i - 1]->nbytes) {
            fail("tensor '" + order[i]->name + "'", "overlaps '" + order[i - 1]->name + "'", kDamagedRemedy);
        }
    }
}

const GgufValue* GgufFile::find(const std::string& key) const {
    const auto it = key_index_.find(key);
    return it == key_index_.end() ? nullptr : &metadata_[it->second].second;
}

const GgufTensor* GgufFile::find_tensor(const std::string& name) const {
    const auto it = tensor_index_.find(name);
    return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

}  // namespace qq
