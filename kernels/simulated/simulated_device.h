#pragma once

#include <memory>
#include <string_view>

#include "kernels/device.h"

namespace moed {

// A machine (kernels/machine_file.h) on a virtual clock, driven by the same calls as a real device and by nothing else:
// - Ops and copies take the time that the machine needs for their bytes and products (kernels/simulated/op_costs.h)
// while
//   all else that runs then takes its share (kernels/simulated/timeline.h). Ops of the host lane, calls of the driver
//   and host_access() pass the host's time; other host code takes none.
// - Memory is addresses; no tensor has contents, with these exceptions: route() and group() write what a RouterSource
//   says; linear() into mapped memory (logits) writes one seeded large number a row and zeroes; copies of at most 64
//   KiB are carried out, since tables may be among them. Layers are told apart by the addresses of their gates, in the
//   order in which they are first routed.
// - now_us() and events tell the virtual time. Same calls, options.seed and options.router: same times.
// For benchmarks and plans: what it answers is made up.
// Errors: as load_machine_file and RouterSource::make; kInvalidArgument for odd amounts of memory.
StatusOr<std::unique_ptr<Device>> open_simulated_device(std::string_view machine_path, const DeviceOptions& options);

}  // namespace moed
