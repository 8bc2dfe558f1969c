#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"

namespace moed::cuda {

// What a machine offers to CUDA, as its driver says. Versions are 1000 * major + 10 * minor.
struct Offer {
  int32_t driver_version = 0;   // the newest CUDA that the driver runs; 0: there is no driver
  int32_t runtime_version = 0;  // that this build was made with
  int32_t num_devices = 0;
  int32_t index = 0;  // of the device asked for
  // Of that device, if there is one:
  std::string name;
  int32_t major = 0;  // compute capability
  int32_t minor = 0;
};

// Whether this build runs there. Pure. Errors: kUnavailable with one line that says what is missing; kInvalidArgument
// for a device that the machine does not have.
Status check_offer(const Offer& offer);

// "0", "1"...: the N of "cuda:N". Errors: kInvalidArgument.
StatusOr<int32_t> parse_index(std::string_view text);

}  // namespace moed::cuda
