#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/bf16.h"
#include "base/status.h"
#include "model/tensor_source.h"

namespace moed {

// One tensor and the place it is read into, as bf16 or as fp32: one of the two pointers is set.
struct TensorLoad {
  std::string name;
  int64_t elements = 0;
  Bf16* bf16 = nullptr;
  float* fp32 = nullptr;
  int64_t bytes() const { return elements * static_cast<int64_t>(bf16 != nullptr ? sizeof(Bf16) : sizeof(float)); }
};

// Reads all of them with a few threads; returns when every thread is done. progress (may be empty) is called from the
// calling thread with the bytes that arrived since its last call. The first error wins and ends the others after the
// tensor they are at.
Status load_tensors(const TensorSource& source, const std::vector<TensorLoad>& loads,
                    const std::function<void(int64_t)>& progress);

}  // namespace moed
