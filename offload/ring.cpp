#include "offload/ring.h"

#include <algorithm>
#include <bit>
#include <string>
#include <utility>

#include "base/check.h"
#include "offload/copy_queue.h"
#include "offload/expert_cache.h"
#include "offload/expert_index.h"
#include "offload/prefetcher.h"
#include "offload/read_fences.h"
#include "offload/slots.h"

namespace moed {
namespace {

// What copies and kernels like blobs to begin on.
constexpr int64_t kAlignBytes = 256;
constexpr int64_t kPacketBytesMin = 256;
constexpr int64_t kPacketBytesMax = int64_t{1} << 30;
// So far a prefetch looks for a slot that holds nothing it wants too.
constexpr int32_t kLookMax = 16;
// Slots for prefetches beyond what is asked for, where there are 16 times as many.
constexpr int32_t kMorePassing = 8;

int64_t stride_bytes(const BlobShape& shape) { return (shape.bytes() + kAlignBytes - 1) / kAlignBytes * kAlignBytes; }

std::string name(ExpertId id) { return "layer " + std::to_string(id.layer) + ", expert " + std::to_string(id.expert); }

Status check_number(const char* field, int64_t value, int64_t min, int64_t max) {
  if (value >= min && value <= max) return {};
  return invalid_argument(std::string("ring: ") + field + " must be between " + std::to_string(min) + " and " +
                              std::to_string(max) + ", not " + std::to_string(value),
                          field);
}

Status check_config(const RingConfig& config, const ExpertIndex& index) {
  const int64_t num_experts = index.size();
  MOED_RETURN_IF_ERROR(check_number("packet_bytes", config.packet_bytes, kPacketBytesMin, kPacketBytesMax));
  MOED_RETURN_IF_ERROR(check_number("staging_slots", config.staging_slots, 1, num_experts));
  std::vector<uint8_t> seen(num_experts);
  for (const ExpertId id : config.resident) {
    if (!index.has(id)) return invalid_argument("ring: resident: the model has no " + name(id), "resident");
    if (std::exchange(seen[index.of(id)], 1) != 0) {
      return invalid_argument("ring: resident: " + name(id) + " is named twice", "resident");
    }
  }
  const auto num_resident = static_cast<int64_t>(config.resident.size());
  const int64_t staging = std::min<int64_t>(config.staging_slots, num_experts - num_resident);
  return check_number("num_slots", config.num_slots, num_resident + staging, num_experts);
}

// How many experts of each layer the cache keeps: as even as it goes.
std::vector<int32_t> cache_shares(const ExpertIndex& index, const std::vector<uint8_t>& resident, int32_t num_kept) {
  std::vector<int32_t> room(index.num_layers(), index.num_experts());
  for (int32_t i = 0; i < index.size(); ++i) room[i / index.num_experts()] -= resident[i];
  std::vector<int32_t> shares(index.num_layers());
  while (num_kept > 0) {
    const auto open =
        static_cast<int32_t>(std::count_if(room.begin(), room.end(), [](int32_t left) { return left > 0; }));
    if (open == 0) break;
    const int32_t dealt = std::min(num_kept, open);
    for (int32_t layer = 0, nth = 0; layer < index.num_layers(); ++layer) {
      if (room[layer] == 0) continue;
      const bool gets = int64_t{nth} * dealt / open != int64_t{nth + 1} * dealt / open;
      ++nth;
      if (!gets) continue;
      ++shares[layer];
      --room[layer];
    }
    num_kept -= dealt;
  }
  return shares;
}

}  // namespace

Lease::Lease(Lease&& other) noexcept : id_(other.id_), view_(other.view_), slot_(std::exchange(other.slot_, -1)) {}

Lease& Lease::operator=(Lease&& other) noexcept {
  MOED_CHECK(slot_ < 0 || this == &other) << "the lease on " << name(id_) << " was not retired";
  id_ = other.id_;
  view_ = other.view_;
  slot_ = std::exchange(other.slot_, -1);
  return *this;
}

Lease::~Lease() { MOED_CHECK(slot_ < 0) << "the lease on " << name(id_) << " was not retired"; }

class Ring final : public ExpertRing {
 public:
  Ring(const ExpertStore& store, const ExpertIndex& index, Device& device, const RingConfig& config,
       std::vector<uint8_t> resident);
  ~Ring() override;
  Status start(const RingConfig& config);

  std::optional<Lease> acquire(ExpertId id) override;
  void acquire_present(int32_t layer, std::vector<Lease>& leases) override;
  bool submitted(const Lease& lease) const override { return slots_[lease.slot()].fill >= Fill::kSubmitted; }
  void order(const Lease& lease, Stream& reader) override;
  void retire(std::vector<Lease>& leases, Stream& reader) override;
  void routed(int32_t layer, RowsId rows, std::span<const int32_t> counts) override;
  void predicted(int32_t layer, RowsId rows, std::span<const int32_t> counts) override;
  bool wants_prediction(int32_t layer) const override;
  static_assert(kPrefetchMax == Prefetcher::kListMax);
  void prefetch(std::span<const ExpertId> wanted) override { prefetcher_.list(wanted); }
  void pump() override;
  void wait() override;
  RingStats stats() const override { return stats_; }
  std::string description() const override;

 private:
  std::byte* data(int32_t slot) const { return memory_.data() + slot * stride_; }
  std::span<uint64_t> present_of(int32_t moe_layer) {
    const size_t words = num_words(index_.num_experts());
    return std::span(present_).subspan(static_cast<size_t>(moe_layer) * words, words);
  }
  Lease lease(int32_t slot, ExpertId id);
  // Puts the slot into the list that it belongs to.
  void settle(int32_t slot) {
    const Slot& at = slots_[slot];
    if (at.list >= 0 || !(at.kept || at.leases > 0 || at.resident)) relist(slot);
  }
  void relist(int32_t slot);
  int32_t take_for_demand();
  int32_t take_for_prefetch();
  void evict(int32_t slot);
  // The slot holds its expert no more.
  void part(Slot& slot);
  void assign(int32_t slot, int32_t expert);
  void keep_if_wanted(int32_t expert);
  void unkeep(Slot& slot);
  // Copies go on, but nobody waits for them.
  void cancel(int32_t slot);
  void collect();
  void arrived(int32_t slot);
  int32_t next_copy();
  int32_t begin_prefetch();
  void submit(int32_t slot);
  void leave_background(int32_t slot);

  const ExpertStore& store_;
  const ExpertIndex index_;
  Device& device_;
  const BlobShape shape_;
  const int64_t stride_;
  const int64_t packet_bytes_;
  HostPins own_pins_;
  const HostPins* pins_;
  int32_t ahead_max_ = 0;  // prefetched experts that nobody asked for yet
  Buffer memory_;
  std::vector<Slot> slots_;
  std::vector<int32_t> slot_of_;     // [experts]; -1: absent
  std::vector<uint64_t> present_;    // a row of bits a layer: those with a slot
  SlotList idle_;                    // pass through, free to be overwritten, the longest unused first
  SlotList ahead_;                   // pass through, nobody's, but somebody will ask for them or they are being filled
  SlotList demand_;                  // leased, to be copied
  std::vector<int32_t> background_;  // begun, to be copied when there is no demand
  std::vector<uint8_t> resident_;    // [experts]
  ExpertCache cache_;
  Prefetcher prefetcher_;
  std::unique_ptr<CopyQueue> copies_;
  ReadFences fences_;
  std::vector<int32_t> freed_;
  bool progressed_ = false;  // a packet arrived or a reader finished since the last wait()
  RingStats stats_;
};

namespace {

int32_t num_passing(const RingConfig& config) {
  const int32_t pool = config.num_slots - static_cast<int32_t>(config.resident.size());
  if (!config.cache) return pool;
  const int32_t more = std::min(std::max(0, pool / 16 - config.staging_slots), kMorePassing);
  return std::min(pool, config.staging_slots + more);
}

std::vector<int32_t> shares_of(const ExpertIndex& index, const std::vector<uint8_t>& resident,
                               const RingConfig& config) {
  const auto num_resident = static_cast<int32_t>(config.resident.size());
  return cache_shares(index, resident, config.num_slots - num_resident - num_passing(config));
}

}  // namespace

StatusOr<std::unique_ptr<ExpertRing>> ExpertRing::make(const ExpertStore& store, const ModelConfig& model,
                                                       Device& device, const RingConfig& config) {
  const ExpertIndex index(model);
  MOED_RETURN_IF_ERROR(check_config(config, index));
  std::vector<uint8_t> resident(index.size());
  for (const ExpertId id : config.resident) resident[index.of(id)] = 1;
  auto ring = std::make_unique<Ring>(store, index, device, config, std::move(resident));
  MOED_RETURN_IF_ERROR(ring->start(config));
  return std::unique_ptr<ExpertRing>(std::move(ring));
}

Ring::Ring(const ExpertStore& store, const ExpertIndex& index, Device& device, const RingConfig& config,
           std::vector<uint8_t> resident)
    : store_(store),
      index_(index),
      device_(device),
      shape_(store.shape()),
      stride_(stride_bytes(shape_)),
      packet_bytes_(config.packet_bytes),
      own_pins_(device),
      pins_(config.pins),
      slots_(config.num_slots),
      slot_of_(index.size(), -1),
      present_(index.num_layers() * num_words(index.num_experts())),
      idle_(slots_, 0),
      ahead_(slots_, 1),
      demand_(slots_, 2),
      resident_(std::move(resident)),
      cache_(index.num_experts(), shares_of(index, resident_, config), resident_),
      prefetcher_(index_, cache_),
      fences_(device, config.num_slots) {
  ahead_max_ = std::max(1, num_passing(config) - (config.staging_slots + 1) / 2);
  background_.reserve(config.num_slots);
  freed_.reserve(int64_t{2} * config.num_slots);
}

Ring::~Ring() = default;

Status Ring::start(const RingConfig& config) {
  if (pins_ == nullptr) {
    store_.pin(own_pins_);
    pins_ = &own_pins_;
  }

  StatusOr<Buffer> memory = device_.allocate(stride_ * config.num_slots, Memory::kDevice);
  if (!memory.ok()) {
    return Status(memory.status().code(), "the expert ring has " + std::to_string(config.num_slots) + " slots of " +
                                              std::to_string(stride_) + " bytes, " +
                                              std::to_string(stride_ * config.num_slots) +
                                              " in all: " + memory.status().message());
  }
  memory_ = std::move(memory).value();
  MOED_ASSIGN_OR_RETURN(copies_, CopyQueue::make(device_, packet_bytes_, pins_->bytes() < store_.blobs_bytes()));
  int32_t slot = 0;
  for (const ExpertId id : config.resident) {
    slots_[slot].resident = true;
    assign(slot, index_.of(id));
    while (slots_[slot].fill < Fill::kSubmitted) {
      if (!copies_->has_room()) arrived(copies_->join());
      submit(slot);
    }
    ++slot;
  }
  while (copies_->num_in_flight() > 0) arrived(copies_->join());
  for (; slot < config.num_slots; ++slot) settle(slot);
  return {};
}

std::string Ring::description() const {
  const auto num_slots = static_cast<int64_t>(slots_.size());
  std::string text = std::to_string(num_slots) + " slots of " + std::to_string(stride_) + " bytes";
  text += ", copies of at most " + std::to_string(packet_bytes_) + " bytes";
  if (!pins_->refusal().ok()) {
    text += " through pinned buffers for " + std::to_string(store_.blobs_bytes() - pins_->bytes()) + " of " +
            std::to_string(store_.blobs_bytes()) + " bytes of experts: " + pins_->refusal().message();
  }
  return text;
}

Lease Ring::lease(int32_t slot, ExpertId id) {
  Lease lease;
  lease.id_ = id;
  lease.view_ = {data(slot), shape_};
  lease.slot_ = slot;
  ++slots_[slot].leases;
  slots_[slot].ahead = false;
  return lease;
}

void Ring::relist(int32_t index) {
  Slot& slot = slots_[index];
  if (idle_.holds(index)) idle_.remove(index);
  if (ahead_.holds(index)) ahead_.remove(index);
  if (slot.resident || slot.kept || slot.leases > 0 || fences_.reading(index)) return;
  if (slot.fill == Fill::kEmpty) {
    idle_.push_front(index);
  } else if (slot.fill == Fill::kArrived && !slot.ahead) {
    idle_.push_back(index);
  } else {
    ahead_.push_back(index);
  }
}

std::optional<Lease> Ring::acquire(ExpertId id) {
  MOED_CHECK(index_.has(id)) << name(id);
  const int32_t expert = index_.of(id);
  int32_t slot = slot_of_[expert];
  if (slot >= 0) {
    ++stats_.hits;
  } else {
    slot = take_for_demand();
    if (slot < 0) {
      collect();
      slot = take_for_demand();
    }
    if (slot < 0) return std::nullopt;
    ++stats_.misses;
    prefetcher_.streamed();
    assign(slot, expert);
  }
  Lease result = lease(slot, id);
  slots_[slot].unused = false;
  keep_if_wanted(expert);
  settle(slot);
  if (slots_[slot].fill < Fill::kSubmitted && !demand_.holds(slot)) {
    leave_background(slot);
    demand_.push_back(slot);
  }
  return result;
}

void Ring::acquire_present(int32_t layer, std::vector<Lease>& leases) {
  if (!index_.has({layer, 0})) return;
  const int32_t first = index_.of({layer, 0});
  const std::span<const uint64_t> present = present_of(index_.moe_layer(layer));
  for (size_t word = 0; word < present.size(); ++word) {
    for (uint64_t bits = present[word]; bits != 0; bits &= bits - 1) {
      const int32_t expert = static_cast<int32_t>(word) * 64 + std::countr_zero(bits);
      const int32_t slot = slot_of_[first + expert];
      if (slots_[slot].fill < Fill::kSubmitted) continue;
      leases.push_back(lease(slot, {layer, expert}));
      slots_[slot].offered = true;
      settle(slot);
    }
  }
}

void Ring::order(const Lease& lease, Stream& reader) {
  const Fill fill = slots_[lease.slot()].fill;
  MOED_CHECK(fill >= Fill::kSubmitted) << name(lease.id()) << " is not submitted";
  if (fill == Fill::kSubmitted) copies_->order(lease.slot(), reader);
}

void Ring::retire(std::vector<Lease>& leases, Stream& reader) {
  bool fenced = false;
  for (const Lease& lease : leases) {
    // What was never submitted was never read.
    if (lease.slot() < 0 || slots_[lease.slot()].fill < Fill::kSubmitted) continue;
    if (!std::exchange(fenced, true)) fences_.begin(reader);
    fences_.add(lease.slot());
  }
  if (fenced) fences_.end();
  for (Lease& lease : leases) {
    const int32_t slot = std::exchange(lease.slot_, -1);
    if (slot < 0) continue;
    MOED_CHECK(slots_[slot].leases > 0) << name(lease.id()) << " has no lease";
    if (--slots_[slot].leases > 0) continue;
    if (demand_.holds(slot)) cancel(slot);
    settle(slot);
  }
  leases.clear();
}

void Ring::cancel(int32_t index) {
  Slot& slot = slots_[index];
  demand_.remove(index);
  if (slot.fill == Fill::kCopying) {
    background_.push_back(index);
    return;
  }
  unkeep(slot);
  part(slot);
  slot.fill = Fill::kEmpty;
}

void Ring::unkeep(Slot& slot) {
  if (!std::exchange(slot.kept, false)) return;
  const ExpertId id = index_.id(slot.expert);
  cache_.drop(index_.moe_layer(id.layer), id.expert);
}

// The least popular of those that were not used for longest.
int32_t Ring::take_for_demand() {
  int32_t best = -1;
  float best_score = 0.0F;
  int32_t slot = idle_.front();
  for (int32_t i = 0; slot >= 0 && i < kLookMax; ++i, slot = idle_.after(slot)) {
    if (slots_[slot].expert < 0) return slot;
    const float score = cache_.score(slots_[slot].expert);
    if (best >= 0 && score >= best_score) continue;
    best = slot;
    best_score = score;
  }
  // Else what was fetched last for later.
  for (int32_t late = ahead_.back(); best < 0 && late >= 0; late = slots_[late].previous) {
    if (copies_->in_flight(late) == 0) best = late;
  }
  return best;
}

int32_t Ring::take_for_prefetch() {
  if (ahead_.size() >= ahead_max_) return -1;
  int32_t slot = idle_.front();
  for (int32_t i = 0; slot >= 0 && i < kLookMax; ++i, slot = idle_.after(slot)) {
    if (slots_[slot].expert < 0 || !prefetcher_.named(slots_[slot].expert)) return slot;
  }
  return -1;
}

void Ring::evict(int32_t index) {
  Slot& slot = slots_[index];
  if (slot.expert < 0) return;
  if (slot.fill == Fill::kArrived) ++stats_.evictions;
  if (slot.unused) ++stats_.prefetched_unused;
  leave_background(index);
  part(slot);
}

void Ring::part(Slot& slot) {
  slot_of_[slot.expert] = -1;
  clear_bit(present_of(slot.expert / index_.num_experts()), slot.expert % index_.num_experts());
  slot.expert = -1;
}

void Ring::assign(int32_t index, int32_t expert) {
  evict(index);
  Slot& slot = slots_[index];
  slot.expert = expert;
  slot.bytes_submitted = 0;
  slot.fill = Fill::kQueued;
  slot.ahead = slot.offered = slot.unused = false;
  slot_of_[expert] = index;
  set_bit(present_of(expert / index_.num_experts()), expert % index_.num_experts());
}

void Ring::keep_if_wanted(int32_t expert) {
  if (resident_[expert] != 0) return;
  const ExpertId id = index_.id(expert);
  const int32_t layer = index_.moe_layer(id.layer);
  if (!cache_.keeps(layer, id.expert) || cache_.kept(layer, id.expert)) return;
  const int32_t displaced = cache_.keep(layer, id.expert);
  slots_[slot_of_[expert]].kept = true;
  if (displaced < 0) return;
  const int32_t slot = slot_of_[index_.of({id.layer, displaced})];
  slots_[slot].kept = false;
  settle(slot);
}

void Ring::routed(int32_t layer, RowsId rows, std::span<const int32_t> counts) {
  MOED_CHECK(index_.has({layer, 0}) && static_cast<int32_t>(counts.size()) == index_.num_experts())
      << "layer " << layer << ", " << counts.size() << " counts";
  const int32_t first = index_.of({layer, 0});
  const int32_t moe_layer = index_.moe_layer(layer);
  const std::span<const uint64_t> present = present_of(moe_layer);
  for (size_t word = 0; word < present.size(); ++word) {
    for (uint64_t bits = present[word]; bits != 0; bits &= bits - 1) {
      const int32_t expert = static_cast<int32_t>(word) * 64 + std::countr_zero(bits);
      Slot& slot = slots_[slot_of_[first + expert]];
      const bool offered = std::exchange(slot.offered, false);
      if (counts[expert] == 0) continue;
      stats_.hits += offered ? 1 : 0;
      slot.unused = false;
    }
  }
  prefetcher_.routed(moe_layer, rows, counts);
  cache_.routed(moe_layer, counts);
  for (size_t word = 0; word < present.size(); ++word) {
    for (uint64_t bits = cache_.missing(moe_layer, word) & present[word]; bits != 0; bits &= bits - 1) {
      const int32_t expert = first + static_cast<int32_t>(word) * 64 + std::countr_zero(bits);
      keep_if_wanted(expert);
      settle(slot_of_[expert]);
    }
  }
}

void Ring::predicted(int32_t layer, RowsId rows, std::span<const int32_t> counts) {
  MOED_CHECK(index_.has({layer, 0}) && static_cast<int32_t>(counts.size()) == index_.num_experts())
      << "layer " << layer << ", " << counts.size() << " counts";
  const int32_t moe_layer = index_.moe_layer(layer);
  prefetcher_.predicted(moe_layer, rows, counts, present_of(moe_layer));
}

bool Ring::wants_prediction(int32_t layer) const {
  return index_.has({layer, 0}) && prefetcher_.wants_prediction(index_.moe_layer(layer));
}

void Ring::pump() {
  collect();
  while (copies_->has_room()) {
    const int32_t slot = next_copy();
    if (slot < 0) return;
    submit(slot);
  }
}

void Ring::wait() {
  const double begin_us = device_.now_us();
  if (copies_->num_in_flight() == 0 && !fences_.any()) pump();
  // A packet first: only when one has arrived may another set out.
  if (copies_->num_in_flight() > 0) {
    arrived(copies_->join());
  } else if (fences_.any()) {
    freed_.clear();
    fences_.join(freed_);
    for (const int32_t slot : freed_) settle(slot);
  } else {
    MOED_CHECK(progressed_) << "nothing is under way and nothing was since the last wait";
  }
  progressed_ = false;
  stats_.wait_us += device_.now_us() - begin_us;
  pump();
}

void Ring::collect() {
  for (int32_t slot = copies_->poll(); slot >= 0; slot = copies_->poll()) arrived(slot);
  freed_.clear();
  fences_.poll(freed_);
  progressed_ = progressed_ || !freed_.empty();
  for (const int32_t slot : freed_) settle(slot);
}

void Ring::arrived(int32_t index) {
  progressed_ = true;
  Slot& slot = slots_[index];
  if (slot.fill != Fill::kSubmitted || copies_->in_flight(index) > 0) return;
  slot.fill = Fill::kArrived;
  if (!slot.ahead) settle(index);
}

int32_t Ring::next_copy() {
  if (demand_.front() >= 0) return demand_.front();
  if (!background_.empty()) return background_.front();
  return begin_prefetch();
}

int32_t Ring::begin_prefetch() {
  const int32_t slot = take_for_prefetch();
  if (slot < 0) return -1;
  const int32_t expert = prefetcher_.next([this](int32_t each) { return slot_of_[each] < 0; });
  if (expert < 0) return -1;
  assign(slot, expert);
  slots_[slot].ahead = slots_[slot].unused = true;
  ++stats_.prefetched;
  keep_if_wanted(expert);
  settle(slot);
  background_.push_back(slot);
  return slot;
}

void Ring::submit(int32_t index) {
  Slot& slot = slots_[index];
  const int64_t bytes = std::min(packet_bytes_, shape_.bytes() - slot.bytes_submitted);
  const std::byte* blob = store_.blob(index_.id(slot.expert)).data;
  copies_->submit({.slot = index,
                   .target = data(index) + slot.bytes_submitted,
                   .source = blob + slot.bytes_submitted,
                   .bytes = bytes,
                   .pinned = pins_->covers(blob, shape_.bytes())});
  slot.bytes_submitted += bytes;
  stats_.bytes_copied += bytes;
  slot.fill = Fill::kCopying;
  if (slot.bytes_submitted < shape_.bytes()) return;
  slot.fill = Fill::kSubmitted;
  if (demand_.holds(index)) demand_.remove(index);
  leave_background(index);
}

void Ring::leave_background(int32_t slot) {
  const auto at = std::find(background_.begin(), background_.end(), slot);
  if (at != background_.end()) background_.erase(at);
}

}  // namespace moed
