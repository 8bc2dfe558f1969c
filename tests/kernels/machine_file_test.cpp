#include "kernels/machine_file.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "kernels/device.h"
#include "tests/support/temporary_folder.h"

namespace moed {
namespace {

constexpr const char* kGood = R"(
name = "box"
[device]
memory_gib = 24
bf16_tflops = 100.0
dram_gb_s = 800.0
kernel_us = 2.0
tile_rows = 64
[link]
h2d_gb_s = 20.0
d2h_gb_s = 21.0
[host]
memory_gib = 64
dram_gb_s = 100.0
bf16_gflops = 1000.0
attention_gb_s = 90.0
attention_gflops = 500.0
fork_us = 3.0
[calls]
launch_us = 4.6
copy_us = 8.4
event_us = 1.0
poll_us = 0.5
wake_us = 3.0
[interference]
dram_share = [0.0, 0.5, 1.0]
link_share = [1.0, 0.8, 0.6]
[noise]
jitter = 0.05
)";

std::string with(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(MachineFile, ReadsEveryField) {
  const auto machine = parse_machine_file(kGood, "box.toml");
  ASSERT_TRUE(machine.ok()) << machine.status().message();
  EXPECT_EQ(machine->name, "box");
  EXPECT_EQ(machine->device.memory_gib, 24.0);  // an integer serves too
  EXPECT_EQ(machine->device.bf16_tflops, 100.0);
  EXPECT_EQ(machine->device.dram_gb_s, 800.0);
  EXPECT_EQ(machine->device.kernel_us, 2.0);
  EXPECT_EQ(machine->device.tile_rows, 64.0);
  EXPECT_EQ(machine->link.h2d_gb_s, 20.0);
  EXPECT_EQ(machine->link.d2h_gb_s, 21.0);
  EXPECT_EQ(machine->host.memory_gib, 64.0);
  EXPECT_EQ(machine->host.dram_gb_s, 100.0);
  EXPECT_EQ(machine->host.bf16_gflops, 1000.0);
  EXPECT_EQ(machine->host.attention_gb_s, 90.0);
  EXPECT_EQ(machine->host.attention_gflops, 500.0);
  EXPECT_EQ(machine->host.fork_us, 3.0);
  EXPECT_EQ(machine->calls.launch_us, 4.6);
  EXPECT_EQ(machine->calls.copy_us, 8.4);
  EXPECT_EQ(machine->calls.event_us, 1.0);
  EXPECT_EQ(machine->calls.poll_us, 0.5);
  EXPECT_EQ(machine->calls.wake_us, 3.0);
  EXPECT_EQ(machine->noise.jitter, 0.05);
  EXPECT_EQ(machine->noise.drift, 0.0);
  EXPECT_EQ(machine->faults, "");
}

TEST(MachineFile, TheCurveIsAPolyline) {
  const auto machine = parse_machine_file(kGood, "box.toml").value();
  EXPECT_DOUBLE_EQ(machine.link_left(-1.0), 1.0);
  EXPECT_DOUBLE_EQ(machine.link_left(0.0), 1.0);
  EXPECT_DOUBLE_EQ(machine.link_left(0.25), 0.9);
  EXPECT_DOUBLE_EQ(machine.link_left(0.5), 0.8);
  EXPECT_DOUBLE_EQ(machine.link_left(0.75), 0.7);
  EXPECT_DOUBLE_EQ(machine.link_left(1.0), 0.6);
  EXPECT_DOUBLE_EQ(machine.link_left(2.0), 0.6);
}

struct BadCase {
  const char* from;
  const char* to;
  const char* field;
  const char* said;
};

TEST(MachineFile, RefusesWhatIsMissingOrAbsurdByName) {
  const std::vector<BadCase> cases{
      {"name = \"box\"", "", "name", "missing"},
      {"name = \"box\"", "name = 7", "name", "text"},
      {"memory_gib = 24", "", "device.memory_gib", "missing"},
      {"memory_gib = 24", "memory_gib = 0", "device.memory_gib", "0.001 to 65536"},
      {"memory_gib = 24", "memory_gib = -24", "device.memory_gib", "is -24"},
      {"memory_gib = 24", "memory_gib = nan", "device.memory_gib", "is nan"},
      {"memory_gib = 24", "memory_gib = inf", "device.memory_gib", "is inf"},
      {"memory_gib = 24", "memory_gib = \"24\"", "device.memory_gib", "is \"24\""},
      {"memory_gib = 24", "memory_gib = true", "device.memory_gib", "must be a number"},
      {"bf16_tflops = 100.0", "bf16_tflops = 1e30", "device.bf16_tflops", "is 1e+30"},
      {"h2d_gb_s = 20.0", "h2d_gb_s = 0.0", "link.h2d_gb_s", "from 0.001"},
      {"tile_rows = 64", "tile_rows = 0", "device.tile_rows", "from 1 to"},
      {"launch_us = 4.6", "launch_us = -4.6", "calls.launch_us", "from 0 to"},
      {"poll_us = 0.5", "poll_us = 0.0", "calls.poll_us", "from 0.01"},
      {"attention_gb_s = 90.0", "attention_gb_s = 101.0", "host.attention_gb_s", "above host.dram_gb_s"},
      {"[link]\n", "[lnk]\n", "link", "missing"},
      {"fork_us", "frok_us = 1.0\nfork_us", "host.frok_us", "unknown"},
      {"[device]", "speed = 1\n[device]", "speed", "unknown"},
      {"[device]", "faults = 1\n[device]", "faults", "must be a table"},
      {"jitter = 0.05", "jitter = 1.0", "noise.jitter", "from 0 to 0.9"},
      {"[0.0, 0.5, 1.0]", "[0.0, 1.0]", "interference.link_share", "3 numbers, but dram_share has 2"},
      {"[0.0, 0.5, 1.0]", "[0.0, 0.5, 0.5]", "interference.dram_share", "ascend"},
      {"[0.0, 0.5, 1.0]", "[0.1, 0.5, 1.0]", "interference.dram_share", "from 0 to 1"},
      {"[0.0, 0.5, 1.0]", "0.5", "interference.dram_share", "list"},
      {"[1.0, 0.8, 0.6]", "[1.0, 0.8, 0.0]", "interference.link_share", "is 0"},
      {"[1.0, 0.8, 0.6]", "[1.0, 0.8, 1.1]", "interference.link_share", "is 1.1"},
      {"[1.0, 0.8, 0.6]", "[1.0, \"x\", 0.6]", "interference.link_share", "is \"x\""},
  };
  for (const BadCase& bad : cases) {
    const auto machine = parse_machine_file(with(kGood, bad.from, bad.to), "box.toml");
    ASSERT_FALSE(machine.ok()) << bad.to;
    const std::string& message = machine.status().message();
    EXPECT_EQ(message.find(std::string("box.toml: ") + bad.field + " "), 0U) << bad.to << ": " << message;
    EXPECT_NE(message.find(bad.said), std::string::npos) << bad.to << ": " << message;
    EXPECT_EQ(machine.status().param(), bad.field);
  }
}

TEST(MachineFile, RefusesWhatIsNoToml) {
  for (const char* text : {"[[[", "name = ", "\x01\x02", "name = \"a\"\nname = \"b\""}) {
    const auto machine = parse_machine_file(text, "box.toml");
    ASSERT_FALSE(machine.ok());
    EXPECT_EQ(machine.status().message().find("box.toml:"), 0U) << machine.status().message();
  }
  EXPECT_EQ(parse_machine_file("", "box.toml").status().param(), "name");
}

TEST(MachineFile, RefusesFilesThatAreNone) {
  const TemporaryFolder folder;
  EXPECT_EQ(load_machine_file(folder.file("none.toml")).status().code(), StatusCode::kNotFound);
  EXPECT_FALSE(load_machine_file(folder.path()).ok());
}

TEST(MachineFile, TheMachinesOfThisProjectAreRead) {
  int num_files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(MOED_SOURCE_DIR "/deploy/machines")) {
    const auto machine = load_machine_file(entry.path());
    ASSERT_TRUE(machine.ok()) << machine.status().message();
    EXPECT_EQ(machine->name, entry.path().stem());
    ++num_files;
  }
  EXPECT_GE(num_files, 4);
}

TEST(MachineFile, AnEmulatedDeviceTakesItsMemory) {
  DeviceOptions options;
  options.num_threads = 1;
  const TemporaryFolder folder;
  const std::string spec = "emulated:" + folder.write("small.toml", with(kGood, "memory_gib = 24", "memory_gib = 0.5"));
  EXPECT_EQ(open_device(spec, options).value()->memory_bytes(), int64_t{1} << 29);
  options.memory_gib = 0.25;  // caps it
  EXPECT_EQ(open_device(spec, options).value()->memory_bytes(), int64_t{1} << 28);
  options.memory_gib = 1.0;  // cannot raise it
  EXPECT_EQ(open_device(spec, options).value()->memory_bytes(), int64_t{1} << 29);
  options.memory_gib = -1.0;
  EXPECT_EQ(open_device(spec, options).status().param(), "device_memory_gib");
}

TEST(MachineFile, AnEmulatedDeviceTakesItsFaults) {
  DeviceOptions options;
  options.num_threads = 1;
  const std::string small = with(kGood, "memory_gib = 24", "memory_gib = 0.1");
  const TemporaryFolder folder;
  const auto device =
      open_device("emulated:" + folder.write("small.toml", small + "[faults]\ninject = \"memory:2\"\n"), options);
  ASSERT_TRUE(device.ok()) << device.status().message();
  EXPECT_TRUE((*device)->allocate(64, Memory::kDevice).ok());
  EXPECT_FALSE((*device)->allocate(64, Memory::kDevice).ok());
  const auto odd =
      open_device("emulated:" + folder.write("small.toml", small + "[faults]\ninject = \"flood\"\n"), options);
  ASSERT_FALSE(odd.ok());
  EXPECT_EQ(odd.status().param(), "faults");
}

TEST(MachineFile, DevicesNameWhatTheyTake) {
  EXPECT_EQ(open_device("emulated:none.toml", {}).status().code(), StatusCode::kNotFound);
  const Status argument = open_device("cpu:1", {}).status();
  EXPECT_NE(argument.message().find("given as cpu"), std::string::npos) << argument.message();
  const Status unknown = open_device("abacus:1", {}).status();
  EXPECT_NE(unknown.message().find("emulated[:FILE]"), std::string::npos) << unknown.message();
}

}  // namespace
}  // namespace moed
