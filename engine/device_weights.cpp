#include "engine/device_weights.h"

namespace moed {

StatusOr<DeviceWeights> DeviceWeights::make(const DenseWeights& weights, Device& device, Stream& stream) {
  DeviceWeights there;
  if (device.is_host()) {
    there.views_ = weights.views();
    return there;
  }
  MOED_ASSIGN_OR_RETURN(there.memory_, device.allocate(weights.bytes(), Memory::kDevice));
  stream.copy(there.memory_.data(), weights.data(), weights.bytes());
  const std::unique_ptr<Event> copied = device.make_event();
  stream.record(*copied);
  MOED_RETURN_IF_ERROR(copied->join());
  there.views_ = weights.views_at(there.memory_.data());
  return there;
}

}  // namespace moed
