#include <gtest/gtest.h>

#include "tests/kernels/cuda_shim/probes.h"

namespace moed {
namespace {

// asan sees what a fiber does, and each array of a block is one allocation.
TEST(CudaOnHostDeathTest, BoundsAreWatched) {
  EXPECT_DEATH(probes::write_past_shared(), "heap-buffer-overflow");
  EXPECT_DEATH(probes::read_past_global(), "heap-buffer-overflow");
}

}  // namespace
}  // namespace moed
