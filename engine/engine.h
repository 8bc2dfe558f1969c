#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "engine/step.h"
#include "plan/plan.h"

namespace moed {

// What lives from begin() to finish(): rows, tables, activations, the layer reached. Each Engine has its own.
class PassState {
 public:
  virtual ~PassState() = default;
};

// A pass of some rows through all layers. Move-only; belongs to the engine that began it.
class Pass {
 public:
  Pass() = default;
  explicit Pass(std::unique_ptr<PassState> state) : state_(std::move(state)) {}
  bool alive() const { return state_ != nullptr; }
  PassState& state() { return *state_; }

 private:
  std::unique_ptr<PassState> state_;
};

// What the engine has done since it was made; all grow only. Zero where no expert runs on a device.
struct EngineStats {
  int64_t expert_hits = 0;    // experts that a layer on the device asked for and that stood in its memory
  int64_t expert_misses = 0;  // that had to be copied
  int64_t experts_prefetched = 0;
  int64_t experts_prefetched_unused = 0;  // overwritten before a layer asked for them
  int64_t expert_evictions = 0;
  int64_t expert_bytes_copied = 0;
  int64_t host_expert_rows = 0;  // rows times the experts that they chose, computed on the host
  int64_t device_expert_rows = 0;
  double ring_wait_us = 0.0;  // time that the host had nothing to do but wait for copies
};

// Runs passes. At most two are alive: an interactive one, which runs through, and a bulk one, which may rest at any
// layer boundary while another runs. Serving thread only. Device failures end the process (MOED_CHECK).
class Engine {
 public:
  virtual ~Engine() = default;
  // REQUIRES: at most one other pass alive; plan valid for the sequences; rows <= rows_max().
  virtual Pass begin(std::span<const StepSequence> sequences, const StepPlan& plan) = 0;
  // Runs one layer; true: more to do. A pass whose sequences were all dropped has nothing more to do.
  virtual bool advance(Pass& pass) = 0;
  // Takes a sequence out between layers: after this nothing of it is read or written. Unknown ids are ignored.
  virtual void drop(Pass& pass, SequenceId id) = 0;
  // REQUIRES: advance() returned false.
  virtual StepOutput finish(Pass&& pass) = 0;
  // Copies the KV of block `from` to block `to` of a pool, all layers (copy on write of a shared last block).
  virtual void copy_block(Pool pool, int32_t from, int32_t to) = 0;
  virtual int32_t rows_max() const = 0;
  virtual EngineStats stats() const { return {}; }
};

}  // namespace moed
