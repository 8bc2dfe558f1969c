#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/tensor_source.h"
#include "tests/support/temporary_folder.h"

namespace moed {

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
