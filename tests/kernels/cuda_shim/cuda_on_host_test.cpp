#include "tests/kernels/cuda_shim/cuda_on_host.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "tests/kernels/cases.h"
#include "tests/kernels/cuda_shim/probes.h"

namespace moed {
namespace {

TEST(CudaOnHost, ThreadsComeInAnOrderThatTheSeedChooses) {
  std::set<std::vector<int>> orders;
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    cuda_on_host::set_seed(seed);
    std::vector<int> order = probes::thread_order(96);
    cuda_on_host::set_seed(seed);
    EXPECT_EQ(order, probes::thread_order(96));
    orders.insert(order);
    std::sort(order.begin(), order.end());
    std::vector<int> all(96);
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(order, all);
  }
  EXPECT_EQ(orders.size(), 5U);
}

TEST(CudaOnHost, SharedMemoryBeginsAsNan) {
  for (const uint32_t word : probes::unwritten_shared(77)) EXPECT_EQ(word, 0xFFFFFFFFU);
}

TEST(CudaOnHost, AMissingBarrierShows) {
  for (const int threads : {32, 64, 1024}) {
    std::vector<int> wanted(threads);
    for (int i = 0; i < threads; ++i) wanted[i] = (i + 1) % threads;
    EXPECT_EQ(probes::neighbours(threads, true), wanted);
    EXPECT_NE(probes::neighbours(threads, false), wanted);
  }
}

TEST(CudaOnHost, CopiesArriveAtTheWait) {
  const probes::CopySeen seen = probes::asynchronous_copy(1234);
  EXPECT_EQ(seen.before, 0xFFFFFFFFU);
  EXPECT_EQ(seen.after, 1234U);
}

TEST(CudaOnHost, FragmentsLieAsDocumented) {
  cases::Random random(3);
  const std::vector<Bf16> a = random.bf16s(16 * 16);
  const std::vector<Bf16> b = random.bf16s(16 * 8);
  for (const bool by_matrices : {false, true}) {
    const std::vector<float> d = probes::multiply(a, b, by_matrices);
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        double wanted = 0.0;
        double norm = 0.0;
        for (int k = 0; k < 16; ++k) {
          const double term =
              double{static_cast<float>(a[row * 16 + k])} * double{static_cast<float>(b[k * 8 + column])};
          wanted += term;
          norm += std::abs(term);
        }
        EXPECT_NEAR(d[row * 8 + column], wanted, 1e-6 * norm) << row << ", " << column;
      }
    }
  }
}

TEST(CudaOnHostDeathTest, WideAccessesMustBeAligned) {
  probes::load_16_from(16);
  probes::store_16_to(32);
  EXPECT_DEATH(probes::load_16_from(8), "what a wide load reads is not aligned");
  EXPECT_DEATH(probes::store_16_to(4), "what a wide store writes is not aligned");
}

TEST(CudaOnHostDeathTest, KernelsAreLoadedBeforeTheyRun) {
  EXPECT_DEATH(probes::launch_unloaded(), "a kernel that was not loaded");
}

TEST(CudaOnHostDeathTest, ThreadsThatDoNotMeetAreTold) {
  EXPECT_DEATH(probes::half_a_warp_shuffles(), "a warp waits for lanes that do not come, at .*probes.cu");
  EXPECT_DEATH(probes::warps_at_different_barriers(), "threads of a block meet at different places: .*probes.cu");
  EXPECT_DEATH(probes::some_threads_end_before_a_barrier(), "a warp waits for lanes that do not come");
  EXPECT_DEATH(probes::too_much_shared_memory(), "shared memory of 51200");
}

}  // namespace
}  // namespace moed
