#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace moed {

// Rates below are those that real code reaches, not peaks; GB/s are 1e9 bytes a second.

struct MachineDevice {
  double memory_gib = 0.0;   // that a process may take
  double bf16_tflops = 0.0;  // of products with fp32 sums
  double dram_gb_s = 0.0;    // of its own memory
  double kernel_us = 0.0;    // a kernel takes at least this on the device
  double tile_rows = 0.0;    // products of fewer rows cost as much as those of this many
};

struct MachineLink {
  double h2d_gb_s = 0.0;
  double d2h_gb_s = 0.0;
};

struct MachineHost {
  double memory_gib = 0.0;
  double dram_gb_s = 0.0;         // all threads reading; what copies read and write counts too
  double bf16_gflops = 0.0;       // products, all threads
  double attention_gb_s = 0.0;    // KV bytes that attention of one query row a sequence reads, all threads
  double attention_gflops = 0.0;  // of attention's products, all threads
  double fork_us = 0.0;           // an op on the compute threads takes at least this
};

// What the serving thread pays to call the driver.
struct MachineCalls {
  double launch_us = 0.0;  // an op
  double copy_us = 0.0;
  double event_us = 0.0;  // to record an event, or to make a stream wait for one
  double poll_us = 0.0;   // to ask whether an event is done
  double wake_us = 0.0;   // from the moment an event is done until a host that waits for it goes on
};

// The share of the link's bandwidth that is left when host threads use some share of the host's DRAM bandwidth: points
// of a polyline, shares of DRAM from 0 to 1, ascending.
struct InterferencePoint {
  double dram_share = 0.0;
  double link_share = 0.0;
};

struct MachineNoise {
  double jitter = 0.0;           // each op and copy takes (1 - jitter .. 1 + jitter) times as long, evenly
  double drift = 0.0;            // and each resource swings between (1 - drift) and (1 + drift)
  double drift_period_s = 60.0;  // once in about so long
};

// A machine to simulate or emulate: deploy/machines/*.toml.
struct MachineFile {
  std::string name;
  MachineDevice device;
  MachineLink link;
  MachineHost host;
  MachineCalls calls;
  std::vector<InterferencePoint> interference;
  MachineNoise noise;
  std::string faults;  // DeviceOptions::faults of an emulated device

  // The polyline at a share of DRAM bandwidth, clamped to [0, 1].
  double link_left(double dram_share) const;
};

// Errors: kInvalidArgument or kNotFound, naming file, field and limit: what is missing, unknown, of another type, or
// absurd (zero, negative, infinite, NaN, far from any machine).
StatusOr<MachineFile> load_machine_file(const std::string& path);
// The same from text; `path` is for errors.
StatusOr<MachineFile> parse_machine_file(std::string_view text, const std::string& path);

}  // namespace moed
