#pragma once

#include <memory>

#include "kernels/device.h"

namespace moed {

// A device as a GPU is one, with the results of the host's kernels and no claim to speed:
// - Device memory is its own (options.memory_gib): a host dereference faults.
// - Streams are queues. Nothing runs before host code waits; then a choice seeded by options.seed lets any stream go on
//   whose waits are met. So work that nothing orders runs in another order sooner or later.
// - A checker follows the order that streams, events and joins give to all that ops and copies read and write, and
//   ends the process when two accesses to the same bytes, one a write, have none; so it does for device memory that is
//   not allocated, buffers freed before the host has waited for their last use, and waits for events never recorded.
// - The host lane is the host: its ops run at once, what they touch counts as the host's, and device memory is out of
//   their reach. So are the slices of its attention, each of which reads and writes all that the whole does.
// - Once something of options.faults has happened, nothing runs any more and what is recorded after it fails in join().
// - Row tables must lie in mapped memory and stay as they are until the host has waited for the op; that is checked.
// Buffers die before streams, streams and events before the device. An op call allocates.
// Errors: kInvalidArgument as the host device, or for odd amounts of memory; kResourceExhausted.
StatusOr<std::unique_ptr<Device>> open_emulated_device(const DeviceOptions& options);

}  // namespace moed
