#pragma once

#include <cstdint>

#include "base/function_ref.h"
#include "kernels/op_ranges.h"

namespace moed {

// What a call of an op moves and computes, counted from its arguments. Where the pairs say which experts and rows it
// touches, what they say counts: an expert's blob once a call, if some row wants it.
struct OpCost {
  int64_t device_bytes = 0;     // read and written in device memory
  int64_t host_read_bytes = 0;  // of host memory: over the link when a device runs the op
  int64_t host_write_bytes = 0;
  double flops = 0.0;            // of matrix products, rows rounded up to whole tiles
  double attention_flops = 0.0;  // of attention
  int64_t host_bytes() const { return host_read_bytes + host_write_bytes; }
};

// is_device: whether an address is of device memory. tile_rows: >= 1. REQUIRES: offsets of ExpertFfn and all tables are
// there.
OpCost op_cost(const OpCall& call, FunctionRef<bool(const void*)> is_device, int64_t tile_rows);

}  // namespace moed
