#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace moed::cuda {

// What the kernels were compiled to, each a compute capability as 10 * major + minor.
struct Compiled {
  std::vector<int32_t> code;  // machine code: runs on GPUs of the same major and the same or a later minor number
  std::vector<int32_t> ptx;   // what a driver translates for any GPU of that capability or a later one
};

// What CMAKE_CUDA_ARCHITECTURES says, commas between: "80,86-real,90-virtual"; a number alone is both. What is none of
// these, "native" say, leaves both empty.
Compiled parse_architectures(std::string_view text);

// What a machine offers to CUDA, as its driver says. Versions are 1000 * major + 10 * minor.
struct Offer {
  int32_t driver_version = 0;   // the newest CUDA that the driver runs; 0: there is no driver
  int32_t runtime_version = 0;  // that this build was made with
  int32_t num_devices = 0;
  std::string refusal;  // what the driver says instead of their number
  int32_t index = 0;    // of the device asked for
  // Of that device, if there is one:
  std::string name;
  int32_t major = 0;  // compute capability
  int32_t minor = 0;
};

// Whether a build of these kernels runs there; nothing compiled: not known to which. Pure. Errors: kUnavailable with
// one line that says what is missing; kInvalidArgument for a device that the machine does not have.
Status check_offer(const Offer& offer, const Compiled& compiled);

// "0", "1"...: the N of "cuda:N". Errors: kInvalidArgument.
StatusOr<int32_t> parse_index(std::string_view text);

}  // namespace moed::cuda
