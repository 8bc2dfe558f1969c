#include "engine/expert_tables.h"

#include <algorithm>

#include "base/check.h"

namespace moed {

int64_t ExpertTables::bytes(const ModelConfig& model) {
  const auto moe_layers = std::count(model.layers.begin(), model.layers.end(), LayerKind::kMoe);
  const int64_t tables = moe_layers == 0 ? 0 : moe_layers + kCalls;
  return (model.num_layers + tables * model.moe.num_experts) * int64_t{sizeof(const std::byte*)};
}

StatusOr<ExpertTables> ExpertTables::make(const ModelConfig& model, const DenseViews& weights,
                                          const ExpertStore& experts, Device& device) {
  ExpertTables tables;
  tables.device_ = &device;
  tables.num_layers_ = model.num_layers;
  tables.num_experts_ = model.moe.num_experts;
  MOED_ASSIGN_OR_RETURN(tables.memory_, device.allocate(bytes(model), Memory::kMapped));
  tables.base_ = tables.memory_.as<const std::byte*>();
  for (int32_t layer = 0; layer < model.num_layers; ++layer) {
    tables.base_[layer] = reinterpret_cast<const std::byte*>(weights.layers[layer].ffn);
    const bool moe = model.layers[layer] == LayerKind::kMoe;
    tables.moe_index_.push_back(moe ? tables.num_moe_layers_++ : -1);
    if (!moe) continue;
    const Table table = tables.cleared(tables.moe_index_.back());
    for (int32_t expert = 0; expert < tables.num_experts_; ++expert) {
      table[expert] = experts.blob({layer, expert}).data;
    }
  }
  for (Call& call : tables.calls_) call.read = device.make_event();
  return tables;
}

std::span<const std::byte* const> ExpertTables::store(int32_t layer) const {
  MOED_CHECK(moe_index_[layer] >= 0) << "layer " << layer << " has no experts";
  return {base_ + num_layers_ + int64_t{moe_index_[layer]} * num_experts_, static_cast<size_t>(num_experts_)};
}

ExpertTables::Table ExpertTables::cleared(int64_t index) {
  const Table table(base_ + num_layers_ + index * num_experts_, static_cast<size_t>(num_experts_));
  device_->host_access(table.data(), static_cast<int64_t>(table.size_bytes()), Access::kWrite);
  std::fill(table.begin(), table.end(), nullptr);
  return table;
}

ExpertTables::Table ExpertTables::take(FunctionRef<void(Event&)> wait) {
  Call& call = calls_[next_];
  if (call.pending) wait(*call.read);
  call.pending = false;
  return cleared(num_moe_layers_ + next_);
}

void ExpertTables::used(Stream& stream) {
  Call& call = calls_[next_];
  stream.record(*call.read);
  call.pending = true;
  next_ = (next_ + 1) % kCalls;
}

}  // namespace moed
