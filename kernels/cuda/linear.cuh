#pragma once

#include "cuda_port.cuh"
#include "kernels/cuda/launch.h"

namespace moed::cuda {

// Whether rows of a matrix that begins at `data` may be read 16 bytes at a time.
inline bool rows_are_wide(const void* data, int64_t stride_elements) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_elements % 8 == 0;
}

// linear() by dot products whatever the number of rows: for few columns, where tiles would leave most of the device
// idle. A row's bits do not depend on the others.
void linear_dots(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y,
                 const Launch& launch);

}  // namespace moed::cuda
