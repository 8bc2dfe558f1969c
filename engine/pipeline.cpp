#include "engine/pipeline.h"

#include <algorithm>

namespace moed {
namespace {

RopeAppend::Norm rope_norm(AttentionConfig::QkNorm norm) {
  if (norm == AttentionConfig::QkNorm::kPerHead) return RopeAppend::Norm::kPerHead;
  if (norm == AttentionConfig::QkNorm::kWhole) return RopeAppend::Norm::kWhole;
  return RopeAppend::Norm::kNone;
}

}  // namespace

KvLayer KvPools::layer(KvPath path, int32_t layer) const {
  if (path == KvPath::kHost) return host->layer(layer);
  KvLayer view = device != nullptr ? device->layer(layer) : staging->layer(0);
  if (staging == nullptr) return view;
  view.staging = staging->layer(0).base;
  view.staging_begin = device != nullptr ? static_cast<int32_t>(device->num_blocks()) : 0;
  return view;
}

Pipeline::Pipeline(const PipelineInputs& inputs, Device& device, Stream& stream, HostLane& lane, MoeExecutor& moe)
    : model_(inputs.model),
      weights_(inputs.weights),
      kv_(inputs.kv),
      rope_(inputs.rope),
      device_(device),
      ops_(device.ops()),
      stream_(stream),
      lane_(lane),
      moe_(moe) {}

void Pipeline::begin(RunningPass& pass) {
  pass.clock().resume();
  moe_.prefetch(pass);
  for (const Half& half : pass.halves()) {
    const RowViews rows = pass.rows(half);
    const Matrix<const Bf16> table(weights_.embedding, model_.vocab_size, model_.hidden_size);
    ops_.embed({rows.tokens, static_cast<size_t>(half.num_rows)}, table, rows.residual, stream_);
    start_layer(0, pass, half);
  }
}

bool Pipeline::advance(RunningPass& pass) {
  if (pass.empty() || pass.layer == model_.num_layers) return false;
  pass.clock().resume();
  moe_.prefetch(pass);
  for (const Half& half : pass.halves()) {
    if (half.num_rows == 0) continue;
    join_attention(pass, half);
    after_attention(pass.layer, pass.rows(half));
    moe_.run(pass.layer, pass, half);
    if (pass.layer + 1 < model_.num_layers) start_layer(pass.layer + 1, pass, half);
  }
  return ++pass.layer < model_.num_layers;
}

void Pipeline::drop(RunningPass& pass, SequenceId id) {
  size_t index = 0;
  Half* half = pass.find(id, index);
  if (half == nullptr) return;
  join_attention(pass, *half);
  pass.drop(*half, index, stream_);
}

void Pipeline::start_layer(int32_t layer, RunningPass& pass, const Half& half) {
  before_attention(layer, pass.rows(half));
  // The host lane's queries first: it may begin while the device is at its own.
  for (const KvPath path : {KvPath::kHost, KvPath::kDevice}) {
    if (half.run(path).num_members == 0) continue;
    if (path == KvPath::kDevice) fetch_staged(layer, half);
    append_kv(layer, pass, half, path);
    pass.clock().mark(Lane::kDense);
    start_attention(layer, pass, half, path);
    if (path == KvPath::kDevice) return_staged(layer, half);
    pass.clock().mark(Lane::kAttention);
  }
}

void Pipeline::before_attention(int32_t layer, const RowViews& rows) {
  const LayerWeights& weights = weights_.layers[layer];
  ops_.rms_norm(rows.residual, {}, weights.attention_norm, model_.rms_norm_eps, rows.normed, stream_);
  ops_.linear(rows.normed, {weights.qkv, weights.qkv_bias, model_.hidden_size, rows.qkv.cols}, false, rows.qkv,
              stream_);
}

void Pipeline::append_kv(int32_t layer, RunningPass& pass, const Half& half, KvPath path) {
  const LayerWeights& weights = weights_.layers[layer];
  const AttentionConfig& attention = model_.attention;
  const RowRun& run = half.run(path);
  const RowViews rows = pass.buffers().rows(half.row_begin + run.row_begin, run.num_rows);
  const auto num_rows = static_cast<size_t>(run.num_rows);
  RopeAppend args;
  args.qkv = rows.qkv;
  args.num_heads = attention.num_heads;
  args.norm = rope_norm(attention.qk_norm);
  args.q_norm = weights.q_norm;
  args.k_norm = weights.k_norm;
  args.eps = model_.rms_norm_eps;
  args.clip = attention.clip_qkv;
  args.cos_sin = rope_;
  args.rotary_dim = model_.rope.rotary_dim;
  args.positions = {rows.positions, num_rows};
  args.slots = {rows.slots, num_rows};
  args.kv = kv_.layer(path, layer);
  args.q = path == KvPath::kHost && !device_.is_host() ? rows.host_q : rows.q;
  ops_.rope_append(args, stream_);
}

void Pipeline::start_attention(int32_t layer, RunningPass& pass, const Half& half, KvPath path) {
  const RowViews rows = pass.rows(half);
  HalfAttention* host = path == KvPath::kHost ? pass.attention(half) : nullptr;
  Attention args;
  args.q = host == nullptr ? rows.q : rows.host_q;
  args.num_heads = model_.attention.num_heads;
  args.kv = kv_.layer(path, layer);
  args.spans = pass.spans(half, path);
  args.scale = model_.attention.scale;
  args.out = host == nullptr ? rows.attention : rows.host_attention;
  if (host != nullptr) {
    host->start(args, stream_);
  } else {
    ops_.attention(args, stream_);
  }
}

void Pipeline::fetch_staged(int32_t layer, const Half& half) {
  for (const Member& member : half.members) {
    if (member.staged()) copy_staged(layer, member, true);
  }
}

void Pipeline::return_staged(int32_t layer, const Half& half) {
  for (const Member& member : half.members) {
    if (member.staged()) copy_staged(layer, member, false);
  }
}

// Blocks that lie one after another in the host's pool go in one copy; in the staging pool they all do.
void Pipeline::copy_staged(int32_t layer, const Member& member, bool fetch) {
  const KvLayer host = kv_.host->layer(layer);
  const KvLayer staging = kv_.staging->layer(0);
  const StepSequence& sequence = member.sequence;
  const int32_t block_tokens = host.block_tokens;
  const int32_t num_tokens = sequence.num_cached + sequence.num_new;
  int32_t block = fetch ? 0 : sequence.num_cached / block_tokens;
  const int32_t end = ((fetch ? sequence.num_cached : num_tokens) + block_tokens - 1) / block_tokens;
  while (block < end) {
    int32_t count = 1;
    while (block + count < end && sequence.blocks[block + count] == sequence.blocks[block] + count) ++count;
    Bf16* there = staging.base + (member.staging_begin + block) * staging.block_stride;
    Bf16* here = host.base + sequence.blocks[block] * host.block_stride;
    stream_.copy(fetch ? there : here, fetch ? here : there, count * kv_.host->block_bytes());
    block += count;
  }
}

void Pipeline::join_attention(RunningPass& pass, const Half& half) {
  HalfAttention* attention = pass.attention(half);
  if (attention == nullptr || !attention->begun()) return;
  lane_.complete(*attention, pass);
  attention->taken();
  const RowRun& run = half.run(KvPath::kHost);
  const RowViews rows = pass.buffers().rows(half.row_begin + run.row_begin, run.num_rows);
  ops_.move(rows.host_attention, rows.attention, stream_);
  pass.clock().mark(Lane::kAttention);
}

void Pipeline::after_attention(int32_t layer, const RowViews& rows) {
  const LayerWeights& weights = weights_.layers[layer];
  ops_.linear(rows.attention, {weights.output, weights.output_bias, model_.q_size(), model_.hidden_size}, true,
              rows.residual, stream_);
  ops_.rms_norm(rows.residual, {}, weights.ffn_norm, model_.rms_norm_eps, rows.normed, stream_);
}

}  // namespace moed
