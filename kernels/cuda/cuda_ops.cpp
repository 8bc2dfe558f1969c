#include "kernels/cuda/cuda_ops.h"

#include <algorithm>
#include <string>

#include "base/check.h"
#include "kernels/cuda/cuda_memory.h"

namespace moed::cuda {
namespace {

OpLimits larger(const OpLimits& a, const OpLimits& b) {
  return {.rows = std::max(a.rows, b.rows),
          .hidden = std::max(a.hidden, b.hidden),
          .intermediate = std::max(a.intermediate, b.intermediate),
          .num_heads = std::max(a.num_heads, b.num_heads),
          .head_dim = std::max(a.head_dim, b.head_dim),
          .context_tokens = std::max(a.context_tokens, b.context_tokens),
          .num_experts = std::max(a.num_experts, b.num_experts),
          .choices = std::max(a.choices, b.choices),
          .vocab = std::max(a.vocab, b.vocab)};
}

}  // namespace

CudaOps::~CudaOps() { free_workspaces(); }

void CudaOps::free_workspaces() {
  context_.activate();
  // cudaFree waits for the device, so that nothing uses them any more.
  for (const Workspace& workspace : workspaces_) context_.check(cudaFree(workspace.data), "freeing a workspace");
  workspaces_.clear();
}

Status CudaOps::add_workspace() {
  void* data = nullptr;
  context_.activate();
  const cudaError_t error = cudaMalloc(&data, workspace_bytes_);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return Status(StatusCode::kResourceExhausted,
                  "cannot allocate " + std::to_string(workspace_bytes_) +
                      " bytes of device memory for the workspace of the kernels: " + error_text(error));
  }
  workspaces_.push_back({static_cast<std::byte*>(data), nullptr});
  return {};
}

// Limits of all who reserve.
Status CudaOps::reserve(const OpLimits& limits) {
  context_.activate();
  load_kernels();
  context_.check_launches("loading the kernels");
  MOED_RETURN_IF_ERROR(context_.status());
  limits_ = larger(limits_, limits);
  const int64_t bytes = std::max(moed::cuda::workspace_bytes(limits_), CudaLinear::kWorkspaceBytes);
  if (bytes > CudaMemory::kOwnBytes / kWorkspacesAtStart) {
    return Status(StatusCode::kResourceExhausted,
                  "the kernels need a workspace of " + std::to_string(bytes) + " bytes for passes of " +
                      std::to_string(limits_.rows) + " rows, at most " +
                      std::to_string(CudaMemory::kOwnBytes / kWorkspacesAtStart) + " are set aside");
  }
  if (bytes <= workspace_bytes_) return {};
  free_workspaces();
  workspace_bytes_ = bytes;
  for (int i = 0; i < kWorkspacesAtStart; ++i) MOED_RETURN_IF_ERROR(add_workspace());
  return {};
}

CudaOps::Workspace& CudaOps::workspace_of(Stream& stream) {
  Workspace* idle = nullptr;
  for (Workspace& workspace : workspaces_) {
    if (workspace.stream == &stream) return workspace;
    if (workspace.stream == nullptr) idle = &workspace;
  }
  if (idle == nullptr) {
    const Status added = add_workspace();
    if (!added.ok()) context_.fail("a further stream", added.message());
    // With no memory left the device has failed for good; what is enqueued until that is seen needs an address.
    idle = added.ok() ? &workspaces_.back() : &workspaces_.front();
  }
  idle->stream = &stream;
  return *idle;
}

void CudaOps::forget(const Stream& stream) {
  for (Workspace& workspace : workspaces_) {
    if (workspace.stream == &stream) workspace.stream = nullptr;
  }
}

Launch CudaOps::launch(Stream& stream) {
  MOED_CHECK(workspace_bytes_ > 0) << "an op before reserve()";
  context_.activate();
  return {.stream = static_cast<CudaStream&>(stream).handle(),
          .workspace = workspace_of(stream).data,
          .workspace_bytes = workspace_bytes_,
          .deterministic = deterministic_};
}

void CudaOps::embed(std::span<const int32_t> tokens, Matrix<const Bf16> table, Matrix<float> out, Stream& stream) {
  moed::cuda::embed(tokens, table, out, launch(stream));
  context_.check_launches("embed");
}

void CudaOps::rms_norm(Matrix<const float> x, std::span<const int32_t> rows, const float* weight, float eps,
                       Matrix<Bf16> out, Stream& stream) {
  moed::cuda::rms_norm(x, rows, weight, eps, out, launch(stream));
  context_.check_launches("rms_norm");
}

void CudaOps::linear(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y,
                     Stream& stream) {
  const Launch to = launch(stream);
  const bool many = x.rows >= CudaLinear::kRowsMin && !deterministic_;
  if (!many || !linear_.run(x, weights, accumulate, y, to)) {
    moed::cuda::linear(x, weights, accumulate, y, to);
  } else if (weights.bias != nullptr) {
    moed::cuda::add_bias(weights.bias, y, to);
  }
  context_.check_launches("linear");
}

void CudaOps::rope_append(const RopeAppend& args, Stream& stream) {
  moed::cuda::rope_append(args, launch(stream));
  context_.check_launches("rope_append");
}

void CudaOps::attention(const Attention& args, Stream& stream) {
  moed::cuda::attention(args, launch(stream));
  context_.check_launches("attention");
}

void CudaOps::route(const Route& args, Stream& stream) {
  moed::cuda::route(args, launch(stream));
  context_.check_launches("route");
}

void CudaOps::group(const Group& args, Stream& stream) {
  moed::cuda::group(args, launch(stream));
  context_.check_launches("group");
}

void CudaOps::expert_ffn(const ExpertFfn& args, Stream& stream) {
  moed::cuda::expert_ffn(args, launch(stream));
  context_.check_launches("expert_ffn");
}

void CudaOps::combine(const Combine& args, Stream& stream) {
  moed::cuda::combine(args, launch(stream));
  context_.check_launches("combine");
}

void CudaOps::sample(const Sample& args, Stream& stream) {
  moed::cuda::sample(args, launch(stream));
  context_.check_launches("sample");
}

void CudaOps::move(Matrix<const Bf16> from, Matrix<Bf16> to, Stream& stream) {
  moed::cuda::move(from, to, launch(stream));
  context_.check_launches("move");
}

}  // namespace moed::cuda
