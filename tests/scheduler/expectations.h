#pragma once

#include <gtest/gtest.h>

#include "tests/scheduler/harness.h"

namespace moed {

inline constexpr PassKind kInteractive = PassKind::kInteractive;
inline constexpr PassKind kBulk = PassKind::kBulk;

inline SchedulerConfig small_config() {
  return {.block_tokens = 4, .num_blocks = 64, .pass_rows_max = 32, .sequences_max = 32, .bulk_rows_min = 8};
}

// Every token is the one that the fake engine gives after those before it, and the choice has ended.
inline void expect_answer(Harness& harness, const RequestSpec& spec, int32_t choice = 0) {
  EXPECT_EQ(harness.of(spec.id, choice).tokens, expected_answer(spec, choice)) << spec.id << "/" << choice;
  EXPECT_NE(harness.of(spec.id, choice).finish, FinishReason::kNone) << spec.id << "/" << choice;
}

// Nothing runs, waits or holds a block.
inline void expect_clean(const Harness& harness) {
  EXPECT_TRUE(harness.scheduler.idle());
  EXPECT_EQ(harness.scheduler.stats().blocks_used(), 0);
  EXPECT_EQ(harness.scheduler.stats().num_running, 0);
  EXPECT_EQ(harness.scheduler.stats().num_waiting, 0);
  EXPECT_EQ(harness.engine.num_alive(), 0);
}

}  // namespace moed
