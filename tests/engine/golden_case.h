#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moed {

// One prompt of a golden case; tests/golden/README.md says what the fields are.
struct GoldenPrompt {
  std::vector<int32_t> tokens;                             // [T]
  std::vector<std::vector<float>> logits;                  // [T][vocab], transformers in fp32
  std::vector<std::vector<float>> logits_bf16;             // [T][vocab], transformers in bf16; prompt 1 alone has them
  std::vector<float> logit_tolerance;                      // [T]
  std::vector<std::vector<std::vector<int32_t>>> experts;  // [MoE layers][T][top_k]
  std::vector<std::vector<float>> router_margin;           // [MoE layers][T]
  std::vector<std::vector<float>> router_error;            // [MoE layers][T]
  std::vector<int32_t> compared;                           // [T]
  std::vector<int32_t> greedy_tokens;                      // [G]
  std::vector<float> greedy_margin;                        // [G]
  std::vector<float> greedy_tolerance;                     // [G]
  int32_t greedy_compared = 0;
};

// The folder with the checkpoint of a case.
std::string golden_dir(const std::string& name);
// Both prompts. Dies with the file's name when it is not as the README says.
std::vector<GoldenPrompt> read_golden(const std::string& name);

}  // namespace moed
