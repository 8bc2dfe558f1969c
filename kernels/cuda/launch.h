#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/ops.h"

namespace moed::cuda {

// Where a call's kernels go, and what they may use on the way. Two calls that may run at the same time need a workspace
// each: a workspace belongs to a stream.
struct Launch {
  void* stream = nullptr;          // cudaStream_t
  std::byte* workspace = nullptr;  // device memory, 256-byte aligned, contents of no interest between calls
  int64_t workspace_bytes = 0;     // >= workspace_bytes() of the limits that calls keep to
  bool deterministic = false;      // one K order for every number of rows
};

// Bytes of workspace for calls within `limits`.
int64_t workspace_bytes(const OpLimits& limits);

// Loads every kernel, so that no pass does: the first use of one waits for the device, and where the driver has to
// translate it, for seconds. What failed is what the runtime's last error says. Of the device that the thread has
// chosen.
void load_kernels();
// Those of one source file each; load_kernels() calls all.
void load_attention_kernels();
void load_expert_ffn_kernels();
void load_group_kernels();
void load_linear_kernels();
void load_rope_append_kernels();
void load_route_kernels();
void load_rows_kernels();
void load_sample_kernels();

// The ops of kernels/ops.h, one function each: enqueues its kernels on launch.stream and returns. All pointers, those
// inside tables included, are ones that kernels can read; attention's spans are read by the host too. A launch that
// failed is what the runtime's last error says after the call. Serving thread only.
void embed(std::span<const int32_t> tokens, Matrix<const Bf16> table, Matrix<float> out, const Launch& launch);
void rms_norm(Matrix<const float> x, std::span<const int32_t> rows, const float* weight, float eps, Matrix<Bf16> out,
              const Launch& launch);
// Own kernels: few rows by dot products, many on the tensor cores.
void linear(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y, const Launch& launch);
// y += bias, for products that a library computes.
void add_bias(const float* bias, Matrix<float> y, const Launch& launch);
void rope_append(const RopeAppend& args, const Launch& launch);
void attention(const Attention& args, const Launch& launch);
void route(const Route& args, const Launch& launch);
void group(const Group& args, const Launch& launch);
void expert_ffn(const ExpertFfn& args, const Launch& launch);
void combine(const Combine& args, const Launch& launch);
void sample(const Sample& args, const Launch& launch);
void move(Matrix<const Bf16> from, Matrix<Bf16> to, const Launch& launch);

}  // namespace moed::cuda
