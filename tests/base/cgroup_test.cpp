#include "base/cgroup.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "tests/support/temporary_folder.h"

namespace moed {
namespace {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// A tree of groups as the kernel would show it.
class CgroupTest : public testing::Test {
 protected:
  void write(const std::string& file, const std::string& text) { root_.write(file, text); }
  CgroupLimits limits(const std::string& self) {
    write("self", self);
    return cgroup_limits(root_.path(), root_.file("self"));
  }

 private:
  TemporaryFolder root_;
};

TEST_F(CgroupTest, NothingThereLimitsNothing) {
  const CgroupLimits none = cgroup_limits("/does/not/exist", "/does/not/exist/either");
  EXPECT_TRUE(std::isinf(none.cpus));
  EXPECT_EQ(none.memory_headroom_bytes, kNoLimit);
}

TEST_F(CgroupTest, MaxLimitsNothing) {
  write("a/cpu.max", "max 100000\n");
  write("a/memory.max", "max\n");
  write("a/memory.current", "123\n");
  EXPECT_TRUE(std::isinf(limits("0::/a\n").cpus));
  EXPECT_EQ(limits("0::/a\n").memory_headroom_bytes, kNoLimit);
}

TEST_F(CgroupTest, OwnGroupCounts) {
  write("a/b/cpu.max", "150000 100000\n");
  write("a/b/memory.max", "1000\n");
  write("a/b/memory.current", "400\n");
  EXPECT_DOUBLE_EQ(limits("0::/a/b\n").cpus, 1.5);
  EXPECT_EQ(limits("0::/a/b\n").memory_headroom_bytes, 600);
  // Version 1 hierarchies beside it are passed over.
  EXPECT_EQ(limits("5:memory:/x\n1:name=systemd:/y\n0::/a/b\n").memory_headroom_bytes, 600);
  // A sibling's limits are not ours.
  EXPECT_EQ(limits("0::/a/c\n").memory_headroom_bytes, kNoLimit);
}

TEST_F(CgroupTest, TightestAncestorWins) {
  write("a/cpu.max", "200000 100000\n");
  write("a/b/cpu.max", "400000 100000\n");
  write("a/memory.max", "1000\n");
  write("a/memory.current", "900\n");
  write("a/b/memory.max", "800\n");
  write("a/b/memory.current", "100\n");
  const CgroupLimits found = limits("0::/a/b\n");
  EXPECT_DOUBLE_EQ(found.cpus, 2.0);
  EXPECT_EQ(found.memory_headroom_bytes, 100);
}

TEST_F(CgroupTest, RootOfTheNamespaceCounts) {
  write("cpu.max", "50000 100000\n");
  write("memory.max", "70\n");
  for (const char* self : {"0::/\n", "0::/a/b\n", "0::/../other\n", ""}) {
    EXPECT_DOUBLE_EQ(limits(self).cpus, 0.5) << self;
    EXPECT_EQ(limits(self).memory_headroom_bytes, 70) << self;
  }
}

TEST_F(CgroupTest, PageCacheIsFree) {
  write("a/memory.max", "1000\n");
  write("a/memory.current", "950\n");
  write("a/memory.stat", "anon 100\nfile 850\ninactive_anon 0\ninactive_file 800\nactive_file 50\n");
  EXPECT_EQ(limits("0::/a\n").memory_headroom_bytes, 850);
  // More than is in use cannot be given back, and a group above its limit has nothing left.
  write("a/memory.stat", "inactive_file 5000\n");
  EXPECT_EQ(limits("0::/a\n").memory_headroom_bytes, 1000);
  write("a/memory.stat", "anon 100\n");
  write("a/memory.current", "1100\n");
  EXPECT_EQ(limits("0::/a\n").memory_headroom_bytes, 0);
}

TEST_F(CgroupTest, NonsenseLimitsNothing) {
  write("a/cpu.max", "many 0\n");
  write("a/memory.max", "lots\n");
  EXPECT_TRUE(std::isinf(limits("0::/a\n").cpus));
  EXPECT_EQ(limits("0::/a\n").memory_headroom_bytes, kNoLimit);
}

}  // namespace
}  // namespace moed
