#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "model/architectures.h"

namespace moed {

// What a tensor is for: says how dummy weights are scaled.
enum class TensorUse : uint8_t { kEmbedding, kHead, kNorm, kBias, kMatrix, kResidualMatrix };

struct RequiredTensor {
  std::string name;
  std::vector<int64_t> shape;
  TensorUse use = TensorUse::kMatrix;
};

// "model.layers.{l}.experts.{e}.w1" with the numbers in place.
std::string tensor_name(std::string_view pattern, int64_t layer, int64_t expert = 0);

// All tensors that the model reads, once each.
std::vector<RequiredTensor> required_tensors(const Model& model);

// "[8, 64]"
std::string shown_shape(const std::vector<int64_t>& shape);

}  // namespace moed
