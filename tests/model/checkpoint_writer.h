#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "model/tensor_source.h"

namespace moed {

// A folder of its own under the system's temporary one, removed with its content.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::string path() const { return path_.string(); }
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

void write_file(const std::string& path, const std::string& content);

// The bytes of a safetensors file: length of the header, header, data.
std::string safetensors_bytes(const std::string& header, const std::string& data);

// One tensor to be written. `data` are its bytes.
struct WrittenTensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::string data;
};
std::string safetensors_bytes(const std::vector<WrittenTensor>& tensors);

// All tensors of a source, in bf16.
std::vector<WrittenTensor> written_tensors(const TensorSource& source);

}  // namespace moed
