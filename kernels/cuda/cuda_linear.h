#pragma once

#include <cstdint>
#include <memory>

#include "base/status.h"
#include "kernels/cuda/launch.h"

namespace moed::cuda {

// Products of many rows by cublasLt. Which of its kernels takes a shape is asked once. Serving thread only.
class CudaLinear {
 public:
  // Of Launch::workspace, what its kernels may want.
  static constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;
  // Fewer go to the own kernel, which reads the weights once.
  static constexpr int32_t kRowsMin = 5;

  // Errors: kUnavailable when the library cannot start.
  static StatusOr<std::unique_ptr<CudaLinear>> make();
  ~CudaLinear();

  // y = x W^T or y += x W^T; no bias. False: the library has no kernel for this call, and nothing was enqueued.
  bool run(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y, const Launch& launch);

 private:
  struct State;
  explicit CudaLinear(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace moed::cuda
