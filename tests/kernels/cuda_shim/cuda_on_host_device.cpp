#include "tests/kernels/cuda_shim/cuda_on_host_device.h"

#include <cstdlib>
#include <cstring>

#include "base/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/host/host_device.h"

namespace moed {
namespace {

struct Free {
  void operator()(std::byte* data) const { std::free(data); }
};

class CudaOnHostOps final : public Ops {
 public:
  explicit CudaOnHostOps(bool deterministic) { launch_.deterministic = deterministic; }

  Status reserve(const OpLimits& limits) override {
    cuda::load_kernels();
    constexpr int64_t kAlignment = 256;
    const int64_t bytes = cuda::workspace_bytes(limits);
    MOED_CHECK(bytes % kAlignment == 0) << bytes;
    workspace_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, bytes)));
    MOED_CHECK(workspace_ != nullptr) << "workspace of " << bytes << " bytes";
    std::memset(workspace_.get(), 0xFF, bytes);
    launch_.workspace = workspace_.get();
    launch_.workspace_bytes = bytes;
    return {};
  }
  void embed(std::span<const int32_t> tokens, Matrix<const Bf16> table, Matrix<float> out, Stream&) override {
    cuda::embed(tokens, table, out, launch_);
  }
  void rms_norm(Matrix<const float> x, std::span<const int32_t> rows, const float* weight, float eps, Matrix<Bf16> out,
                Stream&) override {
    cuda::rms_norm(x, rows, weight, eps, out, launch_);
  }
  void linear(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y, Stream&) override {
    cuda::linear(x, weights, accumulate, y, launch_);
  }
  void rope_append(const RopeAppend& args, Stream&) override { cuda::rope_append(args, launch_); }
  void attention(const Attention& args, Stream&) override { cuda::attention(args, launch_); }
  void route(const Route& args, Stream&) override { cuda::route(args, launch_); }
  void group(const Group& args, Stream&) override { cuda::group(args, launch_); }
  void expert_ffn(const ExpertFfn& args, Stream&) override { cuda::expert_ffn(args, launch_); }
  void combine(const Combine& args, Stream&) override { cuda::combine(args, launch_); }
  void sample(const Sample& args, Stream&) override { cuda::sample(args, launch_); }
  void move(Matrix<const Bf16> from, Matrix<Bf16> to, Stream&) override { cuda::move(from, to, launch_); }

 private:
  std::unique_ptr<std::byte, Free> workspace_;
  cuda::Launch launch_;
};

class CudaOnHostDevice final : public Device {
 public:
  CudaOnHostDevice(std::unique_ptr<Device> host, bool deterministic) : host_(std::move(host)), ops_(deterministic) {}
  std::string_view description() const override { return "cuda_on_host: the CUDA kernels, by fibers"; }
  bool is_host() const override { return true; }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override { return host_->allocate(bytes, memory); }
  std::unique_ptr<Stream> make_stream() override { return host_->make_stream(); }
  std::unique_ptr<Event> make_event() override { return host_->make_event(); }
  Ops& ops() override { return ops_; }
  Ops& host_ops() override { return host_->host_ops(); }
  Stream& host_stream() override { return host_->host_stream(); }
  std::unique_ptr<HostAttention> make_host_attention() override { return host_->make_host_attention(); }

 private:
  void release(std::byte*, int64_t, Memory) override { MOED_CHECK(false) << "buffers belong to the host device"; }
  std::unique_ptr<Device> host_;
  CudaOnHostOps ops_;
};

}  // namespace

std::unique_ptr<Device> open_cuda_on_host(bool deterministic) {
  return std::make_unique<CudaOnHostDevice>(open_host_device({.num_threads = 1}).value(), deterministic);
}

}  // namespace moed
