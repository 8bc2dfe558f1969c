#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bf16.h"

namespace moed {

// How the bytes of a blob are to be read. More formats follow (int8, int4, MXFP4, fp8).
enum class BlobFormat : uint8_t { kBf16 };

// The shape of a gated FFN: y = down(silu(gate x) * up x).
struct BlobShape {
  BlobFormat format = BlobFormat::kBf16;
  int32_t hidden = 0;
  int32_t intermediate = 0;

  // gate, up, down, one after another, K contiguous.
  int64_t bytes() const { return int64_t{3} * hidden * intermediate * int64_t{sizeof(Bf16)}; }
  friend bool operator==(const BlobShape&, const BlobShape&) = default;
};

// One expert (or a dense or shared FFN, which differ from an expert in nothing) as one contiguous run of bytes, the
// same for CPU kernels, DMA and GPU. Does not own. In device memory `data` may not be dereferenced by the host.
struct BlobView {
  const std::byte* data = nullptr;
  BlobShape shape;

  // [intermediate, hidden]
  const Bf16* gate() const { return reinterpret_cast<const Bf16*>(data); }
  // [intermediate, hidden]
  const Bf16* up() const { return gate() + int64_t{shape.hidden} * shape.intermediate; }
  // [hidden, intermediate]
  const Bf16* down() const { return up() + int64_t{shape.hidden} * shape.intermediate; }
};

}  // namespace moed
