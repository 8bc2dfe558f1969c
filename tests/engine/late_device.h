#pragma once

#include <memory>

#include "kernels/device.h"

namespace moed {

// The host device made to run as far behind as the contract of Ops and Stream allows: what is enqueued runs when
// somebody joins an event after it, and not before. It reads mapped memory at that time, as a device would. What the
// host changes too early gives wrong answers here every time.
//
// lane: of its host lane, which then lets the host look around while it computes (Device::on_host_work()); null: the
// host device's own, which cannot.
std::unique_ptr<Device> late_device(std::unique_ptr<Device> host, std::unique_ptr<Device> lane = nullptr);

}  // namespace moed
