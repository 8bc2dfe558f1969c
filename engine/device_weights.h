#pragma once

#include "kernels/device.h"
#include "model/weights.h"

namespace moed {

// The dense weights where the device reads them: in memory of its own, copied there once, or where they are when it is
// the host. `weights` outlives it. Serving thread only.
class DeviceWeights {
 public:
  // Errors: kResourceExhausted with the bytes asked for; what a failed copy says.
  static StatusOr<DeviceWeights> make(const DenseWeights& weights, Device& device, Stream& stream);
  const DenseViews& views() const { return views_; }

 private:
  DeviceWeights() = default;
  Buffer memory_;
  DenseViews views_;
};

}  // namespace moed
