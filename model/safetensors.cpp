#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>
#include <type_traits>
#include <utility>

#include <fmt/format.h>

#include "model/convert.h"
#include "model/json.h"
#include "model/required_tensors.h"
#include "model/tensor_source.h"

namespace moed {
namespace {

constexpr int64_t kHeaderBytesMax = 100'000'000;
constexpr int64_t kIndexBytesMax = 100'000'000;
constexpr int64_t kConvertBytes = 1 << 20;
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

enum class Dtype : uint8_t { kBf16, kF16, kF32, kOther };

struct DtypeRow {
  const char* name;
  int64_t width;
  Dtype dtype;
};
constexpr DtypeRow kDtypes[] = {
    {"BF16", 2, Dtype::kBf16},     {"F16", 2, Dtype::kF16},       {"F32", 4, Dtype::kF32},
    {"F64", 8, Dtype::kOther},     {"I64", 8, Dtype::kOther},     {"U64", 8, Dtype::kOther},
    {"I32", 4, Dtype::kOther},     {"U32", 4, Dtype::kOther},     {"I16", 2, Dtype::kOther},
    {"U16", 2, Dtype::kOther},     {"I8", 1, Dtype::kOther},      {"U8", 1, Dtype::kOther},
    {"BOOL", 1, Dtype::kOther},    {"C64", 8, Dtype::kOther},     {"F8_E5M2", 1, Dtype::kOther},
    {"F8_E4M3", 1, Dtype::kOther}, {"F8_E8M0", 1, Dtype::kOther},
};

// An open file, closed with it.
class File {
 public:
  static StatusOr<File> open(const std::string& path, std::string name) {
    // A FIFO would be waited for until somebody writes to it.
    File file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK), std::move(name));
    struct stat info {};
    if (file.fd_ < 0 || fstat(file.fd_, &info) != 0) {
      return Status(StatusCode::kNotFound, path + ": " + std::strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) return invalid_argument(path + ": not a regular file");
    file.size_ = info.st_size;
    return file;
  }
  ~File() {
    if (fd_ >= 0) close(fd_);
  }
  File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)), size_(other.size_), name_(std::move(other.name_)) {}
  File& operator=(File&&) = delete;

  Status read(int64_t offset, std::byte* out, int64_t bytes) const {
    // Linux reads at most 2 GiB at once.
    constexpr int64_t kOnceMax = int64_t{1} << 30;
    while (bytes > 0) {
      const ssize_t got = pread(fd_, out, std::min(bytes, kOnceMax), offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0)
        return internal_error(fmt::format("{}: cannot read at byte {}: {}", name_, offset, std::strerror(errno)));
      if (got == 0)
        return invalid_argument(fmt::format("{}: ends at byte {}: it shrank while it was read", name_, offset));
      out += got;
      offset += got;
      bytes -= got;
    }
    return Status();
  }
  // The weights have their own copy now: what the page cache keeps would only crowd it.
  void forget(int64_t offset, int64_t bytes) const { posix_fadvise(fd_, offset, bytes, POSIX_FADV_DONTNEED); }
  int64_t size() const { return size_; }
  const std::string& name() const { return name_; }

 private:
  File(int fd, std::string name) : fd_(fd), name_(std::move(name)) {}
  int fd_;
  int64_t size_ = 0;
  std::string name_;
};

struct Tensor {
  const DtypeRow* dtype = nullptr;
  std::vector<int64_t> shape;
  int64_t begin = 0;  // bytes from the start of the file
  int64_t end = 0;
  int32_t file = 0;
  int64_t elements() const { return (end - begin) / dtype->width; }
};

using Tensors = std::map<std::string, Tensor, std::less<>>;

StatusOr<std::vector<int64_t>> parse_integers(const Json* value, const std::string& where, const char* field) {
  std::vector<int64_t> out;
  bool good = value != nullptr && value->is_array();
  for (size_t i = 0; good && i < value->size(); ++i) {
    good = (*value)[i].is_number_unsigned() && (*value)[i].get<uint64_t>() <= INT64_MAX;
    if (good) out.push_back((*value)[i].get<int64_t>());
  }
  if (good) return out;
  return invalid_argument(fmt::format("{}: {} is {}, want a list of non-negative integers", where, field,
                                      value == nullptr ? "absent" : shown(*value)));
}

// `where`: "model.safetensors: tensor lm_head.weight".
StatusOr<Tensor> parse_tensor(const Json& json, const std::string& where, int64_t data_begin, int64_t data_bytes) {
  if (!json.is_object()) return invalid_argument(where + ": its entry is no object");
  Fields fields(json, where);
  Tensor tensor;
  const std::string dtype = fields.text("dtype", "");
  const auto known =
      std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const DtypeRow& row) { return dtype == row.name; });
  if (known == std::end(kDtypes)) fields.refuse("dtype", "BF16, F16 or F32");
  MOED_RETURN_IF_ERROR(fields.status());
  tensor.dtype = known;
  MOED_ASSIGN_OR_RETURN(tensor.shape, parse_integers(fields.find("shape"), where, "shape"));
  MOED_ASSIGN_OR_RETURN(const std::vector<int64_t> offsets,
                        parse_integers(fields.find("data_offsets"), where, "data_offsets"));
  if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data_bytes) {
    return invalid_argument(fmt::format("{}: data_offsets is {}, want [begin, end] within the file's {} bytes of data",
                                        where, shown_shape(offsets), data_bytes));
  }
  int64_t bytes = tensor.dtype->width;
  bool overflow = false;
  for (const int64_t size : tensor.shape) overflow = overflow || __builtin_mul_overflow(bytes, size, &bytes);
  if (overflow || bytes != offsets[1] - offsets[0]) {
    return invalid_argument(fmt::format("{}: shape {} of {} does not make the {} bytes of data_offsets {}", where,
                                        shown_shape(tensor.shape), dtype, offsets[1] - offsets[0],
                                        shown_shape(offsets)));
  }
  tensor.begin = data_begin + offsets[0];
  tensor.end = data_begin + offsets[1];
  return tensor;
}

// Neither overlap nor hole: each tensor begins where the one before ends, and the last ends with the file.
Status check_coverage(const Tensors& tensors, const std::string& file, int64_t data_begin, int64_t file_bytes) {
  std::vector<std::pair<const std::string*, const Tensor*>> ordered;
  for (const auto& [name, tensor] : tensors) ordered.emplace_back(&name, &tensor);
  std::sort(ordered.begin(), ordered.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->begin, a.second->end) < std::pair(b.second->begin, b.second->end);
  });
  int64_t reached = data_begin;
  for (const auto& [name, tensor] : ordered) {
    if (tensor->begin != reached) {
      return invalid_argument(fmt::format("{}: tensor {} begins at byte {} of the data, want {}: tensors {}", file,
                                          *name, tensor->begin - data_begin, reached - data_begin,
                                          tensor->begin < reached ? "overlap" : "leave a hole"));
    }
    reached = tensor->end;
  }
  if (reached == file_bytes) return Status();
  return invalid_argument(fmt::format("{}: tensors end at byte {}, the file at {}", file, reached, file_bytes));
}

StatusOr<Tensors> read_header(const File& file) {
  if (file.size() < 8)
    return invalid_argument(fmt::format("{}: {} bytes are no safetensors file", file.name(), file.size()));
  std::array<unsigned char, 8> prefix{};
  MOED_RETURN_IF_ERROR(file.read(0, reinterpret_cast<std::byte*>(prefix.data()), 8));
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | prefix[i];
  const int64_t limit = std::min(kHeaderBytesMax, file.size() - 8);
  if (length > static_cast<uint64_t>(limit)) {
    return invalid_argument(
        fmt::format("{}: says that its header has {} bytes, want at most {}", file.name(), length, limit));
  }
  std::string header(length, '\0');
  MOED_RETURN_IF_ERROR(file.read(8, reinterpret_cast<std::byte*>(header.data()), static_cast<int64_t>(length)));
  if (header.empty() || header[0] != '{') return invalid_argument(file.name() + ": its header does not begin with {");
  MOED_ASSIGN_OR_RETURN(const Json json, parse_json(header, file.name() + ": header"));
  Tensors tensors;
  const int64_t data_begin = 8 + static_cast<int64_t>(length);
  for (const auto& [name, entry] : json.items()) {
    if (name == "__metadata__") continue;
    const std::string where = file.name() + ": tensor " + name.substr(0, 200);
    MOED_ASSIGN_OR_RETURN(tensors[name], parse_tensor(entry, where, data_begin, file.size() - data_begin));
  }
  MOED_RETURN_IF_ERROR(check_coverage(tensors, file.name(), data_begin, file.size()));
  return tensors;
}

void convert(Dtype from, const std::byte* in, int64_t count, float* out) {
  if (from == Dtype::kF32) {
    std::memcpy(out, in, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, in + 2 * i, sizeof(bits));
    out[i] = from == Dtype::kF16 ? float_of_half(bits) : std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
}

void convert(Dtype from, const std::byte* in, int64_t count, Bf16* out) {
  for (int64_t i = 0; i < count; ++i) {
    float value;
    if (from == Dtype::kF32) {
      std::memcpy(&value, in + 4 * i, sizeof(value));
    } else {
      uint16_t bits;
      std::memcpy(&bits, in + 2 * i, sizeof(bits));
      value = float_of_half(bits);
    }
    out[i] = Bf16(value);
  }
}

class Checkpoint : public TensorSource {
 public:
  Checkpoint(std::vector<File> files, Tensors tensors) : files_(std::move(files)), tensors_(std::move(tensors)) {}

  const std::vector<int64_t>* shape(std::string_view name) const override {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second.shape;
  }
  std::vector<std::string> names() const override {
    std::vector<std::string> names;
    for (const auto& [name, tensor] : tensors_) names.push_back(name);
    return names;
  }
  Status check(std::string_view name, std::span<const int64_t> wanted) const override {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) return TensorSource::check(name, wanted);
    const std::string& file = files_[found->second.file].name();
    if (const Status status = TensorSource::check(name, wanted); !status.ok()) {
      return invalid_argument(file + ": " + status.message());
    }
    if (found->second.dtype->dtype != Dtype::kOther) return Status();
    return invalid_argument(
        fmt::format("{}: tensor {} has dtype {}, want BF16, F16 or F32", file, name, found->second.dtype->name));
  }
  Status read(std::string_view name, std::span<Bf16> out) const override { return read_any(name, out); }
  Status read(std::string_view name, std::span<float> out) const override { return read_any(name, out); }
  bool rounds() const override {
    return std::any_of(tensors_.begin(), tensors_.end(), [](const auto& entry) {
      return entry.second.dtype->dtype == Dtype::kF16 || entry.second.dtype->dtype == Dtype::kF32;
    });
  }

 private:
  template <class T>
  Status read_any(std::string_view name, std::span<T> out) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) return invalid_argument(fmt::format("tensor {} is missing", name));
    const Tensor& tensor = found->second;
    MOED_RETURN_IF_ERROR(check(name, tensor.shape));
    MOED_CHECK(tensor.elements() == static_cast<int64_t>(out.size())) << name << ": " << out.size();
    const File& file = files_[tensor.file];
    const Dtype own = std::is_same_v<T, float> ? Dtype::kF32 : Dtype::kBf16;
    const Status status = tensor.dtype->dtype == own ? file.read(tensor.begin, reinterpret_cast<std::byte*>(out.data()),
                                                                 tensor.end - tensor.begin)
                                                     : read_converted(file, tensor, out);
    file.forget(tensor.begin, tensor.end - tensor.begin);
    return status;
  }

  template <class T>
  static Status read_converted(const File& file, const Tensor& tensor, std::span<T> out) {
    std::vector<std::byte> buffer(std::min(kConvertBytes, tensor.end - tensor.begin));
    for (int64_t at = tensor.begin; at < tensor.end;) {
      const int64_t bytes = std::min<int64_t>(buffer.size(), tensor.end - at);
      MOED_RETURN_IF_ERROR(file.read(at, buffer.data(), bytes));
      convert(tensor.dtype->dtype, buffer.data(), bytes / tensor.dtype->width,
              out.data() + (at - tensor.begin) / tensor.dtype->width);
      at += bytes;
    }
    return Status();
  }

  std::vector<File> files_;
  Tensors tensors_;
};

// Which file holds which tensor: {"weight_map": {tensor: file}}.
StatusOr<std::map<std::string, std::set<std::string>>> read_index(const std::string& path) {
  MOED_ASSIGN_OR_RETURN(const std::string text, read_text_file(path, kIndexBytesMax));
  MOED_ASSIGN_OR_RETURN(const Json json, parse_json(text, kIndexFile));
  const auto map = json.is_object() ? json.find("weight_map") : json.end();
  if (map == json.end() || !map->is_object() || map->empty()) {
    return invalid_argument(std::string(kIndexFile) + ": want an object weight_map from tensors to files");
  }
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [tensor, file] : map->items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    const bool plain = !name.empty() && name != "." && name != ".." &&
                       name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
    if (!plain) {
      return invalid_argument(fmt::format("{}: tensor {} lies in {}, want the name of a file of the same folder",
                                          kIndexFile, tensor.substr(0, 200), shown(file)));
    }
    shards[name].insert(tensor);
  }
  return shards;
}

StatusOr<std::unique_ptr<TensorSource>> open_shards(const std::string& model_dir) {
  MOED_ASSIGN_OR_RETURN(const auto shards, read_index(model_dir + "/" + kIndexFile));
  std::vector<File> files;
  Tensors all;
  for (const auto& [shard, wanted] : shards) {
    MOED_ASSIGN_OR_RETURN(File file, File::open(model_dir + "/" + shard, shard));
    MOED_ASSIGN_OR_RETURN(Tensors tensors, read_header(file));
    for (const std::string& name : wanted) {
      auto found = tensors.extract(name);
      if (found.empty()) {
        return invalid_argument(
            fmt::format("{}: tensor {} is said to lie in {}, which lacks it", kIndexFile, name.substr(0, 200), shard));
      }
      found.mapped().file = static_cast<int32_t>(files.size());
      all.insert(std::move(found));
    }
    files.push_back(std::move(file));
  }
  return std::unique_ptr<TensorSource>(std::make_unique<Checkpoint>(std::move(files), std::move(all)));
}

}  // namespace

StatusOr<std::unique_ptr<TensorSource>> open_checkpoint(const std::string& model_dir) {
  std::error_code error;
  if (!std::filesystem::is_directory(model_dir, error))
    return Status(StatusCode::kNotFound, model_dir + ": not a folder");
  const std::string single = model_dir + "/" + kSingleFile;
  if (!std::filesystem::exists(single, error)) {
    if (std::filesystem::exists(model_dir + "/" + kIndexFile, error)) return open_shards(model_dir);
    return Status(StatusCode::kNotFound,
                  fmt::format("{}: holds neither {} nor {}", model_dir, kSingleFile, kIndexFile));
  }
  MOED_ASSIGN_OR_RETURN(File file, File::open(single, kSingleFile));
  MOED_ASSIGN_OR_RETURN(Tensors tensors, read_header(file));
  std::vector<File> files;
  files.push_back(std::move(file));
  return std::unique_ptr<TensorSource>(std::make_unique<Checkpoint>(std::move(files), std::move(tensors)));
}

}  // namespace moed
