#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "model/architectures.h"
#include "model/tensor_source.h"

namespace moed {

// A slow forward pass in double, written from the definition of the architectures and from the tensors as the
// checkpoint names them: the oracle of the engine. Rounds to bf16 where docs say that the engine does (inputs of
// products, q, k, v, the product of gate and up), so that what is left between the two is the order of fp32 sums. Plain
// rope only; no router groups.
class ReferenceModel {
 public:
  ReferenceModel(const Model& model, const TensorSource& source) : model_(model), source_(source) {}

  struct Output {
    std::vector<std::vector<double>> logprobs;  // [rows][vocab]
    // Of each row, over layers the least gap between the logits of the last expert chosen and the best one left out.
    std::vector<double> router_gaps;
  };
  Output run(std::span<const int32_t> tokens) const;

 private:
  using Rows = std::vector<std::vector<double>>;
  std::vector<float> read(const std::string& pattern, int32_t layer = -1, int32_t expert = -1) const;
  Rows product(const Rows& x, const std::string& weight, const std::string& bias, int32_t layer,
               int32_t expert = -1) const;
  Rows norm(const Rows& x, const std::string& weight, int32_t layer) const;
  void norm_heads(Rows& x, const std::string& weight, int32_t layer) const;
  void rope(Rows& x) const;
  Rows attention(const Rows& x, int32_t layer) const;
  Rows ffn(const Rows& x, int32_t layer, const std::string (&names)[3], int32_t expert = -1) const;
  Rows moe(const Rows& x, int32_t layer, std::vector<double>& gaps) const;

  const Model& model_;
  const TensorSource& source_;
};

}  // namespace moed
