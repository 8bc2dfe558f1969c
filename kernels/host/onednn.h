#pragma once

#include <cstdint>
#include <memory>

#include "kernels/host/kernel_table.h"

namespace moed {

// Products of many rows by oneDNN, in the checkpoint's layout. Its bits depend on the number of rows, so the
// deterministic mode does without. It starts no thread: each call runs on the thread that makes it.
class OneDnn {
 public:
  // Rows of every call: enough to come within a tenth of what it reaches with 512.
  static constexpr int32_t kRows = 64;

  // Whether this build has it (MOED_ONEDNN). Where it has not, nobody makes one.
  static bool is_built();
  // k_max, n_max: the largest blocks to come. Throws std::bad_alloc alone.
  OneDnn(int num_threads, int32_t k_max, int32_t n_max);
  ~OneDnn();

  // Makes the primitive of a block shape when it is first met: the one moment at which memory is taken. False when
  // oneDNN has none, or k or n is too large. Not while run() runs.
  bool prepare(int32_t k, int32_t n);
  // The block's product; x_gathered: the thread's last call had the same x. REQUIRES: prepare(block.k, block.n) was
  // true, block.m is kRows.
  void run(const DotBlock& block, bool x_gathered, int thread);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moed
