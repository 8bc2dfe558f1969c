#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "tests/kernels/cuda_shim/cuda_on_host.h"
#include "tests/kernels/cuda_shim/cuda_on_host_device.h"
#include "tests/kernels/ops_fixture.h"

namespace moed {
namespace {

using cases::Random;
using cuda_on_host::Site;

constexpr uint64_t kSeeds = 6;

// Runs an op and gives back what it wrote.
using Run = std::function<std::string(Ops&, Stream&)>;

struct MutationCase {
  const char* name;
  Run run;
};

template <class T>
void append(std::string& all, const std::vector<T>& more) {
  all.append(reinterpret_cast<const char*>(more.data()), more.size() * sizeof(T));
}

std::string run_rms_norm(Ops& ops, Stream& stream) {
  Random random(1);
  const std::vector<float> x = random.floats(2 * 300);
  const std::vector<float> weight = random.floats(300);
  std::vector<Bf16> out(2 * 300);
  ops.rms_norm({x.data(), 2, 300}, {}, weight.data(), 1e-5F, {out.data(), 2, 300}, stream);
  std::string all;
  append(all, out);
  return all;
}

std::string run_linear(Ops& ops, Stream& stream) {
  std::string all;
  // Beyond the stages of a tile, and rows that end in the middle of 16 bytes.
  for (const auto& [rows, in] : {std::pair{20, 168}, std::pair{9, 168}, std::pair{20, 171}, std::pair{2, 99}}) {
    Random random(in);
    const std::vector<Bf16> x = random.bf16s(int64_t{rows} * in);
    const std::vector<Bf16> w = random.bf16s(int64_t{70} * in);
    std::vector<float> y(int64_t{rows} * 70);
    ops.linear({x.data(), rows, in}, {w.data(), nullptr, in, 70}, false, {y.data(), rows, 70}, stream);
    append(all, y);
  }
  return all;
}

std::string run_rope(Ops& ops, Stream& stream) {
  Random random(4);
  const std::vector<float> qkv = random.floats(2 * 5 * 64);
  const std::vector<float> norm = random.floats(3 * 64);
  const std::vector<float> cos_sin = random.floats(4 * 64);
  const std::vector<int32_t> positions = {3, 1};
  const std::vector<int64_t> slots = {5, 2};
  std::vector<Bf16> cache(2 * 16 * 64, Bf16(0.0F));
  std::vector<Bf16> q(2 * 3 * 64);
  RopeAppend args;
  args.qkv = Matrix<const float>(qkv.data(), 2, 5 * 64);
  args.num_heads = 3;
  args.norm = RopeAppend::Norm::kWhole;
  args.q_norm = norm.data();
  args.k_norm = norm.data();
  args.cos_sin = cos_sin.data();
  args.rotary_dim = 64;
  args.positions = positions;
  args.slots = slots;
  args.kv = {cache.data(), 2 * 16 * 64, 16, 1, 64};
  args.q = Matrix<Bf16>(q.data(), 2, 3 * 64);
  ops.rope_append(args, stream);
  std::string all;
  append(all, q);
  append(all, cache);
  return all;
}

std::string run_route(Ops& ops, Stream& stream) {
  Random random(5);
  const std::vector<Bf16> x = random.bf16s(9 * 64);
  const std::vector<Bf16> gate = random.bf16s(48 * 64, 0.05F);
  const std::vector<float> bias = random.floats(48, 0.05F);
  std::vector<int32_t> experts(9 * 4);
  std::vector<float> weights(9 * 4);
  Route args;
  args.x = Matrix<const Bf16>(x.data(), 9, 64);
  args.gate = {gate.data(), nullptr, 64, 48};
  args.top_k = 4;
  args.num_groups = 8;
  args.groups_kept = 3;
  args.correction_bias = bias.data();
  args.experts = Matrix<int32_t>(experts.data(), 9, 4);
  args.weights = Matrix<float>(weights.data(), 9, 4);
  ops.route(args, stream);
  std::string all;
  append(all, experts);
  append(all, weights);
  return all;
}

std::string run_group(Ops& ops, Stream& stream) {
  Random random(6);
  std::vector<int32_t> experts(400 * 2);
  for (int32_t& expert : experts) expert = static_cast<int32_t>(random.below(7));
  std::vector<int32_t> offsets(8);
  std::vector<int32_t> pairs(experts.size());
  Group args;
  args.experts = Matrix<const int32_t>(experts.data(), 400, 2);
  args.num_experts = 7;
  args.choices = 3;
  args.offsets = offsets.data();
  args.pairs = pairs.data();
  ops.group(args, stream);
  std::string all;
  append(all, offsets);
  append(all, pairs);
  return all;
}

std::string run_expert_ffn(Ops& ops, Stream& stream) {
  std::string all;
  // The last: more experts than the plan takes at once.
  for (const cases::FfnCase& c :
       {cases::FfnCase{40, 168, 72, 2, 1}, {9, 100, 33, 1, 1}, {3, 72, 40, 4, 2}, {300, 8, 8, 300, 1}}) {
    FfnSetup setup(c, 9);
    ops.expert_ffn(setup.args, stream);
    append(all, setup.y);
  }
  return all;
}

std::string run_combine(Ops& ops, Stream& stream) {
  Random random(7);
  const std::vector<float> y = random.floats(5 * 3 * 700);
  const std::vector<float> weights = random.floats(5 * 3);
  std::vector<float> residual = random.floats(5 * 700);
  Combine args;
  args.y = Matrix<const float>(y.data(), 15, 700);
  args.weights = Matrix<const float>(weights.data(), 5, 3);
  args.choices = 3;
  args.residual = Matrix<float>(residual.data(), 5, 700);
  ops.combine(args, stream);
  std::string all;
  append(all, residual);
  return all;
}

std::string run_sample(Ops& ops, Stream& stream) {
  std::string all;
  // Walks of one share of a warp and of several, and ranks that differ in each digit.
  for (const int32_t vocab : {40, 3000}) {
    Random random(vocab);
    std::vector<float> logits = random.floats(int64_t{8} * vocab, 0.2F);
    for (int32_t i = 0; i < 2 * vocab; ++i) logits[i] = 5.0F + static_cast<float>(i % 50) * 0x1p-20F;
    std::vector<SampleRow> rows(8, SampleRow{.temperature = 1.0F});
    for (int i = 0; i < 8; ++i) rows[i].uniform = 0.9 - 0.08 * i;
    rows[0].top_p = rows[2].top_p = rows[3].top_p = 0.99F;
    rows[1].top_k = rows[3].top_k = rows[4].top_k = vocab / 2;
    rows[5].temperature = 0.0F;
    std::vector<int32_t> tokens(8);
    ops.sample({.logits = {logits.data(), 8, vocab}, .rows = rows, .tokens = tokens.data()}, stream);
    append(all, tokens);
  }
  return all;
}

std::string run_attention(Ops& ops, Stream& stream) {
  std::string all;
  // Chunks apart, tiles of four warps, and more spans than the plan takes at once.
  std::vector<std::pair<int32_t, int32_t>> many(260, {2, 1});
  many.emplace_back(300, 1);
  many.emplace_back(3, 20);
  for (const cases::AttentionCase& c :
       {cases::AttentionCase{4, 2, 64, {{300, 1}, {100, 40}}}, {2, 1, 20, {{70, 40}}}, {1, 1, 2, many}}) {
    AttentionSetup setup(c, 3);
    ops.attention(setup.args, stream);
    append(all, setup.out);
  }
  return all;
}

const std::vector<MutationCase>& mutation_cases() {
  static const std::vector<MutationCase> all = {
      {"rms_norm", run_rms_norm}, {"linear", run_linear}, {"rope_append", run_rope},
      {"route", run_route},       {"group", run_group},   {"expert_ffn", run_expert_ffn},
      {"combine", run_combine},   {"sample", run_sample}, {"attention", run_attention}};
  return all;
}

class MutationTest : public testing::TestWithParam<MutationCase> {
 protected:
  void SetUp() override {
    stream_ = device_->make_stream();
    ASSERT_TRUE(device_->ops().reserve(limits()).ok());
  }
  static OpLimits limits() {
    OpLimits limits;
    limits.rows = 400;
    limits.hidden = 168;
    limits.intermediate = 72;
    limits.num_heads = 4;
    limits.head_dim = 64;
    limits.context_tokens = 512;
    limits.num_experts = 300;
    limits.choices = 3;
    limits.vocab = 3000;
    return limits;
  }
  std::string run() { return GetParam().run(device_->ops(), *stream_); }

  // Whether what a child computes without the site differs, or the child dies of it: without its barriers a kernel may
  // use an index that nobody wrote.
  bool shows(const Site& site, uint64_t seed, const std::string& wanted) {
    const pid_t child = fork();
    if (child == 0) {
      const int nowhere = open("/dev/null", O_WRONLY);
      dup2(nowhere, STDERR_FILENO);
      cuda_on_host::set_seed(seed);
      cuda_on_host::drop(&site);
      _exit(run() == wanted ? 0 : 1);
    }
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }

  std::unique_ptr<Device> device_ = open_cuda_on_host(false);
  std::unique_ptr<Stream> stream_;
};

TEST_P(MutationTest, OrderOfThreadsChangesNoBit) {
  const std::string wanted = run();
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    cuda_on_host::set_seed(1000 + seed);
    EXPECT_TRUE(run() == wanted) << "seed " << seed;
  }
}

// Every barrier and every wait for copies of every kernel is needed, and its lack does not go unseen.
TEST_P(MutationTest, ADroppedBarrierShows) {
  cuda_on_host::take_sites();
  const std::string wanted = run();
  const std::vector<Site> sites = cuda_on_host::take_sites();
  ASSERT_FALSE(sites.empty());
  for (const Site& site : sites) {
    bool seen = false;
    for (uint64_t seed = 1; seed <= kSeeds && !seen; ++seed) seen = shows(site, seed, wanted);
    EXPECT_TRUE(seen) << site.file << ":" << site.line << " can be left out";
  }
}

INSTANTIATE_TEST_SUITE_P(Ops, MutationTest, testing::ValuesIn(mutation_cases()),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

}  // namespace
}  // namespace moed
