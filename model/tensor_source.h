#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/bf16.h"
#include "base/status.h"

namespace moed {

// Where weights come from: a checkpoint folder (safetensors, one file or shards) or seeded random numbers. Tensors are
// read by name straight into their final place. Immutable after opening; read() may be called from several threads at
// once.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  // Null when there is no such tensor; else its shape.
  virtual const std::vector<int64_t>* shape(std::string_view name) const = 0;
  virtual std::vector<std::string> names() const = 0;
  // OK when there is such a tensor, it has this shape, and read() can convert it. Errors: kInvalidArgument naming
  // tensor, found, wanted.
  virtual Status check(std::string_view name, std::span<const int64_t> wanted) const;
  // The whole tensor as bf16 (f16 and f32 are rounded to nearest even). out.size() must equal its number of elements.
  virtual Status read(std::string_view name, std::span<Bf16> out) const = 0;
  // The same as fp32, without rounding.
  virtual Status read(std::string_view name, std::span<float> out) const = 0;
  // True when some tensor is stored wider than bf16: one warning is due.
  virtual bool rounds() const = 0;
  // True when tensors have shapes alone: whoever loads them takes addresses (HugePages::reserve) and reads nothing.
  virtual bool hollow() const { return false; }
};

// model.safetensors, or model.safetensors.index.json and its shards. Follows symlinks; shard names hold no path
// separators. Checks each header (safetensors' rules: sizes, offsets, overlaps, holes, duplicates, overflow) before
// anything is allocated. Errors: kInvalidArgument naming file, tensor, found and wanted.
StatusOr<std::unique_ptr<TensorSource>> open_checkpoint(const std::string& model_dir);

}  // namespace moed
