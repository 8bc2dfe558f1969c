#include "offload/expert_store.h"

#include <algorithm>
#include <future>
#include <numeric>
#include <utility>

#include "base/cpu_places.h"
#include "base/log.h"
#include "base/numa.h"
#include "model/load_tensors.h"
#include "model/required_tensors.h"

namespace moed {
namespace {

constexpr int64_t kPageBytes = 4096;

// Blobs begin on cache lines.
int64_t stride_bytes(const BlobShape& shape) {
  constexpr int64_t kAlignBytes = 64;
  return (shape.bytes() + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
}

void add_loads(const Model& model, ExpertId id, std::byte* blob, std::vector<TensorLoad>* loads) {
  const TensorNames& names = model.names;
  const int64_t elements = int64_t{model.config.hidden_size} * model.config.moe.intermediate_size;
  Bf16* target = reinterpret_cast<Bf16*>(blob);
  for (const std::string* name : {&names.expert_gate, &names.expert_up, &names.expert_down}) {
    loads->push_back({.name = tensor_name(*name, id.layer, id.expert), .elements = elements, .bf16 = target});
    target += elements;
  }
}

// Over all nodes that the compute threads may run on, so that each thread reads as fast as the others and together they
// have the bandwidth of all; on a machine of one node nothing happens.
void spread(const HugePages& arena) {
  const std::vector<int> nodes = numa_nodes(allowed_cpus());
  if (nodes.size() < 2 || arena.size() == 0) return;
  if (const Status status = interleave(arena.data(), arena.size(), nodes); !status.ok()) {
    spdlog::warn("the experts' memory lies where it is written first, not on {} nodes in turn: {}", nodes.size(),
                 status.message());
  }
}

}  // namespace

StatusOr<ExpertStore> ExpertStore::load(const Model& model, const TensorSource& source,
                                        const std::function<void(int64_t)>& progress, HostPins* pins) {
  const ModelConfig& config = model.config;
  ExpertStore store;
  store.shape_ = {.hidden = config.hidden_size, .intermediate = config.moe.intermediate_size};
  store.num_experts_ = config.moe.num_experts;
  int32_t num_moe_layers = 0;
  for (const LayerKind kind : config.layers)
    store.moe_index_.push_back(kind == LayerKind::kMoe ? num_moe_layers++ : -1);
  const int64_t stride = store.stride_bytes_ = stride_bytes(store.shape_);
  const int64_t bytes = store.blobs_bytes_ = stride * num_moe_layers * store.num_experts_;
  MOED_ASSIGN_OR_RETURN(store.arena_, source.hollow() ? HugePages::reserve(bytes) : HugePages::allocate(bytes));
  if (!source.hollow()) spread(store.arena_);
  if (source.hollow()) {
    if (pins != nullptr) store.pin(*pins);
    return store;
  }
  std::vector<TensorLoad> loads;
  std::byte* blob = store.arena_.data();
  for (ExpertId id; id.layer < config.num_layers; ++id.layer) {
    if (config.layers[id.layer] != LayerKind::kMoe) continue;
    for (id.expert = 0; id.expert < store.num_experts_; ++id.expert, blob += stride) add_loads(model, id, blob, &loads);
  }
  if (Status status = store.read(source, loads, progress, pins); !status.ok()) {
    if (pins != nullptr) pins->clear();
    return status;
  }
  return store;
}

int64_t ExpertStore::piece_bytes(const HostPins& pins) const {
  int64_t num_blobs = std::max<int64_t>(1, pins.chunk_bytes() / stride_bytes_);
  // Drivers pin whole pages, and none twice: pieces end where pages do.
  const int64_t blobs_to_a_page = kPageBytes / std::gcd(stride_bytes_, kPageBytes);
  if (num_blobs > blobs_to_a_page) num_blobs -= num_blobs % blobs_to_a_page;
  return num_blobs * stride_bytes_;
}

// Piece by piece: while one is read, the one before is pinned.
Status ExpertStore::read(const TensorSource& source, std::span<const TensorLoad> loads,
                         const std::function<void(int64_t)>& progress, HostPins* pins) {
  if (pins == nullptr || blobs_bytes_ == 0) return load_tensors(source, {loads.begin(), loads.end()}, progress);
  const int64_t piece = piece_bytes(*pins);
  const auto piece_loads = static_cast<size_t>(piece / stride_bytes_ * 3);
  std::future<void> pinned;
  for (int64_t begin = 0; begin < blobs_bytes_; begin += piece) {
    const auto some = loads.first(std::min(piece_loads, loads.size()));
    loads = loads.subspan(some.size());
    MOED_RETURN_IF_ERROR(load_tensors(source, {some.begin(), some.end()}, progress));
    if (pinned.valid()) pinned.get();
    pinned = std::async(std::launch::async, [this, pins, begin, size = std::min(piece, blobs_bytes_ - begin)] {
      pins->pin(arena_.data() + begin, size);
    });
  }
  pinned.get();
  return {};
}

void ExpertStore::pin(HostPins& pins) const {
  const int64_t piece = piece_bytes(pins);
  for (int64_t begin = 0; begin < blobs_bytes_; begin += piece) {
    pins.pin(arena_.data() + begin, std::min(piece, blobs_bytes_ - begin));
  }
}

BlobView ExpertStore::blob(ExpertId id) const {
  MOED_CHECK(id.layer >= 0 && id.layer < static_cast<int32_t>(moe_index_.size()) && moe_index_[id.layer] >= 0 &&
             id.expert >= 0 && id.expert < num_experts_)
      << "layer " << id.layer << ", expert " << id.expert;
  const int64_t index = int64_t{moe_index_[id.layer]} * num_experts_ + id.expert;
  return {arena_.data() + index * stride_bytes_, shape_};
}

}  // namespace moed
