#pragma once

#include <memory>
#include <vector>

#include "kernels/cuda/cuda_context.h"
#include "kernels/cuda/cuda_linear.h"
#include "kernels/cuda/cuda_stream.h"
#include "kernels/ops.h"

namespace moed::cuda {

// The ops of a GPU: each call launches the kernels of launch.h on its stream. A launch that fails surfaces at the next
// join(). Serving thread only.
class CudaOps final : public Ops {
 public:
  // context and linear outlive it. deterministic: no library, and one K order for every number of rows.
  CudaOps(Context& context, CudaLinear& linear, bool deterministic)
      : context_(context), linear_(linear), deterministic_(deterministic) {}
  ~CudaOps() override;

  Status reserve(const OpLimits& limits) override;
  void embed(std::span<const int32_t> tokens, Matrix<const Bf16> table, Matrix<float> out, Stream& stream) override;
  void rms_norm(Matrix<const float> x, std::span<const int32_t> rows, const float* weight, float eps, Matrix<Bf16> out,
                Stream& stream) override;
  void linear(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y,
              Stream& stream) override;
  void rope_append(const RopeAppend& args, Stream& stream) override;
  void attention(const Attention& args, Stream& stream) override;
  void route(const Route& args, Stream& stream) override;
  void group(const Group& args, Stream& stream) override;
  void expert_ffn(const ExpertFfn& args, Stream& stream) override;
  void combine(const Combine& args, Stream& stream) override;
  void sample(const Sample& args, Stream& stream) override;
  void move(Matrix<const Bf16> from, Matrix<Bf16> to, Stream& stream) override;
  // The stream dies: its workspace is the next one's.
  void forget(const Stream& stream);

 private:
  struct Workspace {
    std::byte* data = nullptr;
    const Stream* stream = nullptr;  // whose it is; null: nobody's
  };
  // So many from the start: what an engine computes on. A further one is taken when a stream first runs an op.
  static constexpr int kWorkspacesAtStart = 2;

  Launch launch(Stream& stream);
  Workspace& workspace_of(Stream& stream);
  Status add_workspace();
  void free_workspaces();

  Context& context_;
  CudaLinear& linear_;
  const bool deterministic_;
  OpLimits limits_;
  int64_t workspace_bytes_ = 0;  // of each
  std::vector<Workspace> workspaces_;
};

}  // namespace moed::cuda
