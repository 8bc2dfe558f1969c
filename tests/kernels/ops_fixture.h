#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "tests/kernels/cases.h"
#include "tests/kernels/ops_devices.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/staged_ops.h"

namespace moed {

inline constexpr int32_t kRowsMax = 600;

struct OpsDeviceName {
  std::string operator()(const testing::TestParamInfo<OpsDevice>& info) const {
    return info.param.device + "_" + info.param.isa;
  }
};

// Every op on every device and every ISA that this CPU has, against the references in double.
class OpsTest : public testing::TestWithParam<OpsDevice> {
 protected:
  void SetUp() override {
    auto device = open_ops_device(GetParam(), false);
    ASSERT_TRUE(device.ok()) << device.status().message();
    device_ = std::move(*device);
    stream_ = device_->make_stream();
    staged_ = std::make_unique<StagedOps>(*device_);
    ASSERT_TRUE(device_->ops().reserve(cases::limits_for(kRowsMax)).ok());
  }
  bool has_tensor_cores() const { return GetParam().device.starts_with("cuda"); }
  // On a device with memory of its own, ops that carry their arguments there and back.
  Ops& ops() { return device_->is_host() ? device_->ops() : *staged_; }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<StagedOps> staged_;
};

template <class T>
void expect_close(const T* got, const std::vector<double>& wanted, const std::vector<double>& tolerances) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double value = static_cast<float>(got[i]);
    ASSERT_LE(std::abs(value - wanted[i]), tolerances[i])
        << "at " << i << ": got " << value << ", wanted " << wanted[i];
  }
}

// Error of one rounding to bf16 beside a relative error of a few fp32 operations.
inline std::vector<double> bf16_tolerances(const std::vector<double>& wanted) {
  std::vector<double> out;
  for (const double value : wanted) {
    out.push_back(reference::tolerance(reference::kEpsBf16, 0.25, std::abs(value)) +
                  reference::tolerance(reference::kEpsFloat, 64, std::abs(value)) + 1e-12);
  }
  return out;
}

struct AttentionSetup {
  cases::PagedKv kv;
  std::vector<Bf16> q;
  std::vector<AttentionSpan> spans;
  std::vector<Bf16> out;
  Attention args;
  int32_t rows = 0;

  AttentionSetup(const cases::AttentionCase& c, uint32_t seed) : kv(cases::make_kv(c, seed)) {
    for (size_t i = 0; i < c.spans.size(); ++i) {
      spans.push_back({rows, c.spans[i].second, c.spans[i].first, kv.blocks[i].data()});
      rows += c.spans[i].second;
    }
    cases::Random random(seed + 1);
    const int32_t width = c.num_heads * c.head_dim;
    q = random.bf16s(int64_t{rows} * width);
    out.resize(q.size());
    args.q = Matrix<const Bf16>(q.data(), rows, width);
    args.num_heads = c.num_heads;
    args.kv = kv.layer;
    args.spans = spans;
    args.scale = 1.0F / std::sqrt(static_cast<float>(c.head_dim)) / 8.0F;
    args.out = Matrix<Bf16>(out.data(), rows, width);
  }
};

// Pairs of random rows and experts, in the order of Group, and what the FFN of all of them needs.
struct FfnSetup {
  std::vector<std::vector<Bf16>> weights;
  std::vector<const std::byte*> blobs;
  std::vector<Bf16> x;
  std::vector<int32_t> offsets;
  std::vector<int32_t> pairs;
  std::vector<Bf16> scratch;
  std::vector<float> y;
  ExpertFfn args;

  FfnSetup(const cases::FfnCase& c, uint32_t seed) {
    cases::Random random(seed);
    const int32_t num_pairs = c.rows * c.choices;
    args.shape = {BlobFormat::kBf16, c.hidden, c.intermediate};
    x = random.bf16s(int64_t{c.rows} * c.hidden);
    for (int32_t expert = 0; expert < c.experts; ++expert) {
      offsets.push_back(static_cast<int32_t>(pairs.size()));
      for (int32_t pair = 0; pair < num_pairs; ++pair) {
        if ((pair / c.choices * 7 + pair % c.choices) % c.experts == expert) pairs.push_back(pair);
      }
      weights.push_back(random.bf16s(args.shape.bytes() / 2, 1.0F / std::sqrt(static_cast<float>(c.hidden))));
      blobs.push_back(reinterpret_cast<const std::byte*>(weights.back().data()));
    }
    offsets.push_back(static_cast<int32_t>(pairs.size()));
    scratch.assign(int64_t{num_pairs} * c.intermediate, Bf16(-3.0F));
    y.assign(int64_t{num_pairs} * c.hidden, -3.0F);
    args.x = Matrix<const Bf16>(x.data(), c.rows, c.hidden);
    args.blobs = blobs;
    args.offsets = offsets.data();
    args.pairs = pairs.data();
    args.pairs_max = num_pairs;
    args.choices = c.choices;
    args.scratch = Matrix<Bf16>(scratch.data(), num_pairs, c.intermediate);
    args.y = Matrix<float>(y.data(), num_pairs, c.hidden);
  }
};

}  // namespace moed
