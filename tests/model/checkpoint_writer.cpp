#include "tests/model/checkpoint_writer.h"

#include <cstring>

#include <nlohmann/json.hpp>

namespace moed {

std::string safetensors_bytes(const std::string& header, const std::string& data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(header.size() >> (8 * i) & 0xff));
  return bytes + header + data;
}

std::string safetensors_bytes(const std::vector<WrittenTensor>& tensors) {
  nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const WrittenTensor& tensor : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {data.size(), data.size() + tensor.data.size()}}};
    data += tensor.data;
  }
  return safetensors_bytes(header.dump(), data);
}

std::vector<WrittenTensor> written_tensors(const TensorSource& source) {
  std::vector<WrittenTensor> tensors;
  for (const std::string& name : source.names()) {
    const std::vector<int64_t>& shape = *source.shape(name);
    size_t elements = 1;
    for (const int64_t size : shape) elements *= static_cast<size_t>(size);
    std::vector<Bf16> values(elements);
    const Status status = source.read(name, std::span(values));
    MOED_CHECK(status.ok()) << status.message();
    std::string data(elements * sizeof(Bf16), '\0');
    std::memcpy(data.data(), values.data(), data.size());
    tensors.push_back({name, "BF16", shape, std::move(data)});
  }
  return tensors;
}

}  // namespace moed
