#pragma once

#include <memory>

#include "kernels/device.h"

namespace moed {

// The CPU as a device: every memory is the host's, streams run their work at once on the calling thread and the pool.
// Errors: kInvalidArgument for an ISA that is unknown or that this CPU lacks, or a negative number of threads.
StatusOr<std::unique_ptr<Device>> open_host_device(const DeviceOptions& options);

}  // namespace moed
