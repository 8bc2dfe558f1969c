#pragma once

#include <cstdint>

namespace moed {

// Where sequences keep their KV. split: on the device while a sequence's prompt and the reserve fit there, else on the
// host.
enum class KvPlacement : uint8_t { kHost, kDevice, kSplit };

}  // namespace moed
