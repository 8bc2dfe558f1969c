#pragma once

#include <gtest/gtest.h>

#include "tests/engine/engine_box.h"

namespace moed {

// Prompts of up to 70 tokens with all kinds of sampling.
std::vector<Job> random_jobs(const ModelConfig& config, int count, uint64_t seed);

// Tokens and log-probabilities, bit by bit.
::testing::AssertionResult same_bits(const std::vector<ScoredToken>& a, const std::vector<ScoredToken>& b);
::testing::AssertionResult same_bits(const Answer& a, const Answer& b);

// Each job alone, whole prompts at once.
std::vector<Answer> answers_alone(EngineBox& box, std::span<const Job> jobs);

}  // namespace moed
