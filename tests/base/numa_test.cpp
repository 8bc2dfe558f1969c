#include "base/numa.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/huge_pages.h"
#include "tests/support/temporary_folder.h"

namespace moed {
namespace {

// A folder of nodes as the kernel would show it.
class NumaTest : public testing::Test {
 protected:
  void write(const std::string& file, const std::string& text) { root_.write(file, text); }
  std::vector<int> nodes(const std::vector<int>& cpus) {
    std::vector<CpuPlace> places;
    for (const int cpu : cpus) places.push_back({.cpu = cpu});
    return numa_nodes(places, root_.path());
  }

 private:
  TemporaryFolder root_;
};

TEST_F(NumaTest, NothingThereIsNoNode) { EXPECT_TRUE(nodes({0, 1}).empty()); }

TEST_F(NumaTest, NodesThatTheProcessMayRunOn) {
  write("has_memory", "0-2\n");
  write("node0/cpulist", "0-3,8-11\n");
  write("node1/cpulist", "4-7,12-15\n");
  write("node2/cpulist", "16\n");
  EXPECT_EQ(nodes({0}), std::vector<int>({0}));
  EXPECT_EQ(nodes({11, 12}), std::vector<int>({0, 1}));
  EXPECT_EQ(nodes({3, 4, 16}), std::vector<int>({0, 1, 2}));
  EXPECT_TRUE(nodes({17}).empty());
  EXPECT_TRUE(nodes({}).empty());
}

// Memory without CPUs (a slow tier, say), CPUs without memory, numbers with gaps.
TEST_F(NumaTest, NodesThatLackCpusOrMemoryAreLeftOut) {
  write("has_memory", "0,3,10\n");
  write("node0/cpulist", "0-1\n");
  write("node1/cpulist", "2-3\n");
  write("node3/cpulist", "\n");
  write("node10/cpulist", "4-5\n");
  EXPECT_EQ(nodes({0, 1, 2, 3, 4, 5}), std::vector<int>({0, 10}));
}

TEST_F(NumaTest, NonsenseIsLeftOut) {
  write("has_memory", "x,-1,1-,0,2-1,99999999999,1-99999\n");
  write("node0/cpulist", "0-999999999,junk\n");
  write("node1/cpulist", "-\n");
  EXPECT_EQ(nodes({7}), std::vector<int>({0}));
}

// This machine's node 0: the kernel says which policy rules the pages, or has said that it refuses one.
TEST(Numa, InterleavedPagesAreSo) {
  HugePages pages = HugePages::allocate(int64_t{4} << 20).value();
  const std::vector<int> nodes = {0};
  const Status status = interleave(pages.data(), pages.size(), nodes);
  if (!status.ok()) {
    EXPECT_EQ(status.message().rfind("mbind: ", 0), 0U) << status.message();
    GTEST_SKIP() << status.message();
  }
  for (const int64_t at : {int64_t{0}, pages.size() - 1}) {
    int policy = -1;
    ASSERT_EQ(syscall(SYS_get_mempolicy, &policy, nullptr, 0UL, pages.data() + at, MPOL_F_ADDR), 0);
    EXPECT_EQ(policy, MPOL_INTERLEAVE);
  }
}

}  // namespace
}  // namespace moed
