#include "base/cpu_places.h"

#include <gtest/gtest.h>

namespace moed {
namespace {

using Cpus = std::vector<int>;

// Two packages of two cores of two threads; siblings side by side, as some kernels number them.
const std::vector<CpuPlace> kAdjacent = {{0, 0, 0}, {1, 0, 0}, {2, 0, 1}, {3, 0, 1},
                                         {4, 1, 0}, {5, 1, 0}, {6, 1, 1}, {7, 1, 1}};
// The same with all first threads before all second ones.
const std::vector<CpuPlace> kApart = {{0, 0, 0}, {1, 0, 1}, {2, 1, 0}, {3, 1, 1},
                                      {4, 0, 0}, {5, 0, 1}, {6, 1, 0}, {7, 1, 1}};

TEST(CpuPlaces, OneThreadOfEachCore) {
  EXPECT_EQ(one_cpu_per_core(kAdjacent), (Cpus{0, 2, 4, 6}));
  EXPECT_EQ(one_cpu_per_core(kApart), (Cpus{0, 1, 2, 3}));
  EXPECT_EQ(one_cpu_per_core({}), Cpus{});
}

TEST(CpuPlaces, AffinityMayKeepOnlySecondThreads) {
  const std::vector<CpuPlace> some = {{1, 0, 0}, {2, 0, 1}, {3, 0, 1}, {7, 1, 1}};
  EXPECT_EQ(one_cpu_per_core(some), (Cpus{1, 2, 7}));
}

TEST(CpuPlaces, PinnedWhenThreadsAreAsManyAsCores) {
  EXPECT_EQ(pinned_cpus(kAdjacent, 4), (Cpus{0, 2, 4, 6}));
  EXPECT_EQ(pinned_cpus(kApart, 4), (Cpus{0, 1, 2, 3}));
}

TEST(CpuPlaces, OtherNumbersAreLeftToTheKernel) {
  for (const int num_threads : {1, 2, 3, 5, 8, 9}) EXPECT_EQ(pinned_cpus(kAdjacent, num_threads), Cpus{});
}

TEST(CpuPlaces, ThisMachine) {
  const std::vector<CpuPlace> cpus = allowed_cpus();
  ASSERT_FALSE(cpus.empty());
  const size_t num_cores = one_cpu_per_core(cpus).size();
  EXPECT_GE(num_cores, 1U);
  EXPECT_LE(num_cores, cpus.size());
}

}  // namespace
}  // namespace moed
