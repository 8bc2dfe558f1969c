#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/host/isa.h"
#include "kernels/ops.h"

namespace moed::cases {

// Shapes that the suite checks and the benchmark times.
struct LinearCase {
  int32_t rows;
  int32_t in;
  int32_t out;
};
inline constexpr LinearCase kLinear[] = {{1, 1, 1},     {1, 7, 3},      {1, 127, 129},  {1, 576, 960},
                                         {2, 33, 17},   {3, 129, 31},   {4, 31, 127},   {5, 1000, 7},
                                         {7, 64, 1000}, {8, 63, 65},    {13, 576, 9},   {16, 1536, 64},
                                         {33, 127, 40}, {127, 129, 23}, {129, 32, 127}, {40, 576, 960}};
inline constexpr LinearCase kLinearSpeed[] = {
    {1, 576, 960},    {1, 4096, 4096},  {1, 576, 49152},   {2, 1536, 576},   {6, 1536, 576},   {32, 1536, 576},
    {4, 576, 49152},  {8, 4096, 4096},  {16, 576, 1536},   {16, 4096, 4096}, {64, 576, 1536},  {64, 1536, 576},
    {128, 1536, 576}, {256, 576, 1536}, {256, 4096, 4096}, {512, 576, 1536}, {512, 1536, 576}, {512, 4096, 4096}};

struct FfnCase {
  int32_t rows;
  int32_t hidden;
  int32_t intermediate;
  int32_t experts;
  int32_t choices;
};
inline constexpr FfnCase kFfn[] = {{1, 64, 96, 4, 2},    {3, 65, 33, 8, 2},    {17, 127, 129, 5, 3}, {70, 32, 40, 2, 2},
                                   {300, 64, 300, 2, 1}, {1, 576, 1536, 8, 2}, {130, 40, 200, 3, 1}};
inline constexpr FfnCase kFfnSpeed[] = {
    {1, 576, 1536, 8, 2}, {4, 576, 1536, 8, 2}, {16, 576, 1536, 8, 2}, {128, 576, 1536, 8, 2}, {512, 576, 1536, 8, 2}};

// cached, rows: one span each.
struct AttentionCase {
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  std::vector<std::pair<int32_t, int32_t>> spans;
};
inline const std::vector<AttentionCase>& attention_cases() {
  static const std::vector<AttentionCase> all = {
      {1, 1, 2, {{0, 1}}},
      {9, 3, 64, {{0, 5}, {16, 1}, {255, 3}, {256, 1}, {700, 1}}},
      {4, 4, 20, {{3, 1}, {0, 129}}},
      {8, 1, 128, {{1000, 1}, {250, 12}}},
      {6, 2, 80, {{31, 7}, {511, 2}, {0, 1}}},
      {40, 1, 18, {{270, 3}}},
      {5, 5, 96, {{0, 300}}},
      {2, 1, 200, {{290, 1}, {5, 40}}},
  };
  return all;
}

// Bell-shaped numbers in which one in a hundred is thirty times as large.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  float operator()() {
    const float x = normal_(engine_);
    return engine_() % 100 == 0 ? 30.0F * x : x;
  }
  std::vector<float> floats(int64_t n, float scale = 1.0F) {
    std::vector<float> out(n);
    for (float& x : out) x = scale * (*this)();
    return out;
  }
  std::vector<Bf16> bf16s(int64_t n, float scale = 1.0F) {
    std::vector<Bf16> out(n);
    for (Bf16& x : out) x = Bf16(scale * (*this)());
    return out;
  }
  uint32_t below(uint32_t n) { return engine_() % n; }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

inline std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  const IsaList list = isas();
  for (int i = 0; i < list.count; ++i) {
    if (list.data[i].supported()) names.emplace_back(list.data[i].name);
  }
  return names;
}

// Paged KV of random numbers with blocks in shuffled order, a third of them staged; NaN wherever no span may look.
struct PagedKv {
  std::vector<Bf16> memory;
  std::vector<Bf16> staging;
  std::vector<std::vector<int32_t>> blocks;
  KvLayer layer;
};
inline PagedKv make_kv(const AttentionCase& c, uint32_t seed) {
  constexpr int32_t kBlockTokens = 16;
  PagedKv kv;
  Random random(seed);
  int32_t num_blocks = 0;
  for (const auto& [cached, rows] : c.spans) num_blocks += (cached + rows + kBlockTokens - 1) / kBlockTokens;
  std::vector<int32_t> order(num_blocks);
  for (int32_t i = 0; i < num_blocks; ++i) order[i] = i;
  for (int32_t i = num_blocks - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
  const int64_t stride = int64_t{2} * c.num_kv_heads * kBlockTokens * c.head_dim;
  const int32_t num_staged = num_blocks / 3;
  kv.memory.assign((num_blocks - num_staged) * stride, Bf16(NAN));
  kv.layer = {kv.memory.data(), stride, kBlockTokens, c.num_kv_heads, c.head_dim};
  if (num_staged > 0) {
    kv.staging.assign(num_staged * stride, Bf16(NAN));
    kv.layer.staging = kv.staging.data();
    kv.layer.staging_begin = num_blocks - num_staged;
  }
  int32_t next = 0;
  for (const auto& [cached, rows] : c.spans) {
    std::vector<int32_t>& mine = kv.blocks.emplace_back();
    for (int32_t p = 0; p < cached + rows; ++p) {
      if (p % kBlockTokens == 0) mine.push_back(order[next++]);
      for (int32_t head = 0; head < c.num_kv_heads; ++head) {
        for (int32_t d = 0; d < c.head_dim; ++d) {
          kv.layer.k(mine.back(), head)[p % kBlockTokens * c.head_dim + d] = Bf16(random());
          kv.layer.v(mine.back(), head)[p % kBlockTokens * c.head_dim + d] = Bf16(random());
        }
      }
    }
  }
  return kv;
}

inline OpLimits limits_for(int32_t rows, int32_t choices = 4) {
  OpLimits limits;
  limits.rows = rows;
  limits.hidden = 4096;
  limits.intermediate = 14336;
  limits.num_heads = 64;
  limits.head_dim = 256;
  limits.context_tokens = 4096;
  limits.num_experts = 256;
  limits.choices = choices;
  limits.vocab = 151936;
  return limits;
}

}  // namespace moed::cases
