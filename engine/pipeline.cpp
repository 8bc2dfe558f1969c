#include "engine/pipeline.h"

namespace moed {
namespace {

RopeAppend::Norm rope_norm(AttentionConfig::QkNorm norm) {
  if (norm == AttentionConfig::QkNorm::kPerHead) return RopeAppend::Norm::kPerHead;
  if (norm == AttentionConfig::QkNorm::kWhole) return RopeAppend::Norm::kWhole;
  return RopeAppend::Norm::kNone;
}

}  // namespace

Pipeline::Pipeline(const PipelineInputs& inputs, Device& device, Stream& stream)
    : model_(inputs.model),
      weights_(inputs.weights),
      kv_(inputs.kv),
      rope_(inputs.rope),
      ops_(device.ops()),
      stream_(stream),
      moe_(inputs.model, inputs.weights, inputs.experts, device, stream) {}

void Pipeline::begin(RunningPass& pass) {
  pass.clock().mark(Lane::kIdle);
  for (const Half& half : pass.halves()) {
    const RowViews rows = pass.rows(half);
    const Matrix<const Bf16> table(weights_.embedding(), model_.vocab_size, model_.hidden_size);
    ops_.embed({rows.tokens, static_cast<size_t>(half.num_rows)}, table, rows.residual, stream_);
    start_layer(0, pass, half);
  }
}

bool Pipeline::advance(RunningPass& pass) {
  if (pass.empty() || pass.layer == model_.num_layers) return false;
  pass.clock().mark(Lane::kIdle);
  for (const Half& half : pass.halves()) {
    if (half.num_rows == 0) continue;
    const RowViews rows = pass.rows(half);
    after_attention(pass.layer, rows);
    moe_.run(pass.layer, rows, pass.clock());
    if (pass.layer + 1 < model_.num_layers) start_layer(pass.layer + 1, pass, half);
  }
  return ++pass.layer < model_.num_layers;
}

void Pipeline::start_layer(int32_t layer, RunningPass& pass, const Half& half) {
  before_attention(layer, pass.rows(half));
  pass.clock().mark(Lane::kDense);
  run_attention(layer, pass, half);
  pass.clock().mark(Lane::kAttention);
}

void Pipeline::before_attention(int32_t layer, const RowViews& rows) {
  const LayerWeights& weights = weights_.layer(layer);
  const AttentionConfig& attention = model_.attention;
  const auto num_rows = static_cast<size_t>(rows.residual.rows);
  ops_.rms_norm(rows.residual, {}, weights.attention_norm, model_.rms_norm_eps, rows.normed, stream_);
  ops_.linear(rows.normed, {weights.qkv, weights.qkv_bias, model_.hidden_size, rows.qkv.cols}, false, rows.qkv,
              stream_);
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
  args.kv = kv_.layer(layer);
  args.q = rows.q;
  ops_.rope_append(args, stream_);
}

void Pipeline::run_attention(int32_t layer, const RunningPass& pass, const Half& half) {
  const RowViews rows = pass.rows(half);
  Attention args;
  args.q = rows.q;
  args.num_heads = model_.attention.num_heads;
  args.kv = kv_.layer(layer);
  args.spans = pass.spans(half);
  args.scale = model_.attention.scale;
  args.out = rows.attention;
  ops_.attention(args, stream_);
}

void Pipeline::after_attention(int32_t layer, const RowViews& rows) {
  const LayerWeights& weights = weights_.layer(layer);
  ops_.linear(rows.attention, {weights.output, weights.output_bias, model_.q_size(), model_.hidden_size}, true,
              rows.residual, stream_);
  ops_.rms_norm(rows.residual, {}, weights.ffn_norm, model_.rms_norm_eps, rows.normed, stream_);
}

}  // namespace moed
