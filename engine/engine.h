#pragma once

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
};

}  // namespace moed
