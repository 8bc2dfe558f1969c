#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"

namespace moed {

// Radians a position turns by: [rotary_dim / 2], scaling applied. By the formulas of transformers' modeling_rope_utils,
// in double.
std::vector<double> rope_frequencies(const RopeConfig& rope);

// [positions, rotary_dim]: of each position rotary_dim / 2 cosines, then as many sines, both times attention_factor.
// Computed in double, then rounded.
std::vector<float> rope_cos_sin(const RopeConfig& rope, int32_t positions);

}  // namespace moed
