#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "kernels/blob.h"
#include "kernels/device.h"
#include "model/config.h"
#include "offload/expert_store.h"
#include "offload/host_pins.h"
#include "offload/rows_id.h"

namespace moed {

struct RingConfig {
  int32_t num_slots = 0;           // of device memory, each as large as a blob: resident, cache and staging together
  int32_t staging_slots = 2;       // of these, at least as many for experts that pass through; 2 for each live half
  std::vector<ExpertId> resident;  // copied at start, never evicted; a slot each
  bool cache = true;               // false: what is neither resident nor leased is soon overwritten: plain streaming
  int64_t packet_bytes = 4 << 20;  // of one copy; to be at most 0.3 ms of the link
  // Those of the store's memory that were made while it was loaded; they outlive the ring. null: the ring pins it.
  const HostPins* pins = nullptr;
};

// Monotonic since start.
struct RingStats {
  // Experts that were wanted and stood there, or were on their way: acquired by name, or leased by acquire_present()
  // when routed() said that rows chose them.
  int64_t hits = 0;
  int64_t misses = 0;  // acquired experts that had to be copied
  int64_t prefetched = 0;
  int64_t prefetched_unused = 0;  // overwritten before anyone acquired them
  int64_t bytes_copied = 0;
  int64_t evictions = 0;
  double wait_us = 0.0;  // wait(): time that the host had nothing better to do than wait for the ring
};

// The right to read an expert in device memory. Move-only; must go back by ExpertRing::retire() before it dies.
class Lease;

// Experts in device memory: slots taken at start; SE-MoE's ring memory with a cache that survives the pass. A slot is
// filled by packets on a stream of its own, read under leases, and free again when the device has finished reading,
// not when the host let go. Promotion from staging to cache changes the slot's owner and never copies. Serving thread
// only; allocates at construction alone.
class ExpertRing {
 public:
  // Errors: kInvalidArgument naming the field (num_slots fewer than staging_slots and resident need, more than the
  // model has experts to fill; a resident expert that does not exist or is named twice), kResourceExhausted with the
  // arithmetic. The resident experts are there when it returns.
  static StatusOr<std::unique_ptr<ExpertRing>> make(const ExpertStore& store, const ModelConfig& model, Device& device,
                                                    const RingConfig& config);
  virtual ~ExpertRing() = default;

  // A lease on the expert: of the slot that holds it, or of one that it will now be copied to, before all prefetches.
  // nullopt: each slot that it might take is leased or still being read: retire() something, or wait().
  virtual std::optional<Lease> acquire(ExpertId id) = 0;
  // Leases of all experts of the layer whose copies are enqueued; appends them.
  virtual void acquire_present(int32_t layer, std::vector<Lease>& leases) = 0;
  // Whether the last packet of the lease's copy is enqueued, so that order() may be called. pump() gets it there.
  virtual bool submitted(const Lease& lease) const = 0;
  // Later work of `reader` comes after the lease's copy. REQUIRES: submitted().
  virtual void order(const Lease& lease, Stream& reader) = 0;
  // The leases end; the last reads are those that `reader` holds so far. Empties the vector.
  virtual void retire(std::vector<Lease>& leases, Stream& reader) = 0;

  // What a layer's rows asked for: counts[expert] rows. Feeds popularity, the ghost lists and the prefetcher's scores.
  virtual void routed(int32_t layer, RowsId rows, std::span<const int32_t> counts) = 0;
  // What the next layer's router says of this layer's hidden state: scored against routed() of the same rows, used
  // while it wins.
  virtual void predicted(int32_t layer, RowsId rows, std::span<const int32_t> counts) = 0;
  // Whether a prediction for the layer would be used or is due for scoring: if not, it need not be computed.
  virtual bool wants_prediction(int32_t layer) const = 0;
  // What should come after the routed misses, in this order, of which the first kPrefetchMax count; replaces the list
  // of before. Copies that are under way go on.
  static constexpr int32_t kPrefetchMax = 512;
  virtual void prefetch(std::span<const ExpertId> wanted) = 0;

  // Enqueues what may be enqueued (at most two packets in flight, routed misses before prefetches) and takes back what
  // has been read. Never waits; to be called between slices of host work.
  virtual void pump() = 0;
  // Waits until a packet has arrived or a reader has finished, then pumps. REQUIRES: one of both is under way, or was
  // since the last wait(): then it returns at once.
  virtual void wait() = 0;

  virtual RingStats stats() const = 0;
  // "96 slots of 9437184 bytes, copies of at most 4194304 bytes", and why copies take a detour where they do.
  virtual std::string description() const = 0;
};

class Lease {
 public:
  Lease() = default;
  Lease(Lease&& other) noexcept;
  Lease& operator=(Lease&& other) noexcept;
  // MOED_CHECK: it was retired.
  ~Lease();
  ExpertId id() const { return id_; }
  // In device memory: for ops that come after ExpertRing::order().
  BlobView view() const { return view_; }
  int32_t slot() const { return slot_; }

 private:
  friend class ExpertRing;
  friend class Ring;
  ExpertId id_;
  BlobView view_;
  int32_t slot_ = -1;  // -1: none
};

}  // namespace moed
