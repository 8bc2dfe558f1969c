#!/usr/bin/env python3
"""Writes what transformers says of configurations, for the tests of this folder to compare with:
rope_expected.json: inverse frequencies and attention factors; default_expected.json: every field that a config.json
may leave out, per architecture.

Needs `pip install transformers==5.23.0 numpy`, no torch: the few torch functions that modeling_rope_utils calls are
given here by numpy in float64, so that the numbers are those of transformers' formulas without fp32's rounding.

    python tests/model/make_expected.py
"""

import json
import logging
import math
import pathlib
import types

import numpy as np
import transformers
from transformers import LlamaConfig, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig
from transformers import modeling_rope_utils as rope_utils


class Array(np.ndarray):
    """A float64 array with the one method of a tensor that is called."""

    def to(self, device=None, dtype=None):
        return self.astype(np.float64)


def array(values):
    return np.asarray(values, dtype=np.float64).view(Array)


rope_utils.torch = types.SimpleNamespace(
    float=np.float64,
    float32=np.float64,
    int64=np.int64,
    arange=lambda *args, **kwargs: array(np.arange(*args)),
    clamp=lambda x, low, high: array(np.clip(x, low, high)),
    where=lambda condition, a, b: array(np.where(condition, a, b)),
)

BASE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 64, "vocab_size": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}

# name, class, fields beside BASE.
CASES = [
    ("default", LlamaConfig, {}),
    ("default_theta_mixtral", MixtralConfig, {}),
    ("default_theta", LlamaConfig, {"rope_theta": 500000.0}),
    ("default_parameters", Qwen3Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("linear", LlamaConfig, {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("llama3", LlamaConfig, {"rope_theta": 500000.0, "max_position_embeddings": 131072, "rope_scaling": LLAMA3}),
    ("llama3_parameters", LlamaConfig,
     {"max_position_embeddings": 131072, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0, "factor": 32.0}}),
    ("llama3_model_field", LlamaConfig,
     {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
      "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}),
    ("yarn", Qwen3Config,
     {"rope_theta": 1e6, "max_position_embeddings": 131072,
      "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}),
    ("yarn_without_original", Qwen3Config,
     {"rope_theta": 1e6, "max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("yarn_untruncated", LlamaConfig,
     {"max_position_embeddings": 4096, "rope_parameters": {
         "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096,
         "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}}),
    ("yarn_mscale", LlamaConfig,
     {"max_position_embeddings": 163840, "rope_parameters": {
         "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
         "mscale": 0.707, "mscale_all_dim": 1.0}}),
    ("yarn_attention_factor", LlamaConfig,
     {"max_position_embeddings": 16384, "rope_parameters": {
         "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 8192,
         "attention_factor": 1.25}}),
    ("yarn_short", LlamaConfig,
     {"max_position_embeddings": 64, "rope_parameters": {
         "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}}),
]


def computed(config):
    parameters = config.rope_parameters
    if parameters["rope_type"] == "default":  # compute_default_rope_parameters of the models' own files
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 1.0 / parameters["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim), 1.0
    return rope_utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)


DEFAULT_FIELDS = [
    "attention_bias", "clip_qkv", "decoder_sparse_step", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "intermediate_size", "max_position_embeddings", "mlp_bias", "mlp_only_layers", "moe_intermediate_size",
    "norm_topk_prob", "num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers",
    "num_key_value_heads", "num_local_experts", "qkv_bias", "rms_norm_eps", "rope_parameters",
    "shared_expert_intermediate_size", "tie_word_embeddings", "vocab_size"]


def defaults(kind):
    config = kind()
    fields = {field: getattr(config, field) for field in DEFAULT_FIELDS if hasattr(config, field)}
    return {"architecture": kind.__name__.replace("Config", "ForCausalLM"), **fields}


def rope_case(name, kind, fields):
    config = kind(**json.loads(json.dumps({**BASE, **fields})))
    frequencies, attention_factor = computed(config)
    assert all(math.isfinite(x) for x in frequencies)
    return {"name": name, "config": {"architectures": [kind.__name__.replace("Config", "ForCausalLM")], **BASE, **fields},
            "attention_factor": float(attention_factor), "frequencies": [float(x) for x in frequencies]}


def write(name, cases):
    document = {"transformers": transformers.__version__, "cases": cases}
    (pathlib.Path(__file__).parent / name).write_text(json.dumps(document, indent=0) + "\n")


def main():
    logging.disable(logging.WARNING)
    write("rope_expected.json", [rope_case(*case) for case in CASES])
    kinds = [MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig, OlmoeConfig, LlamaConfig, Qwen3Config]
    write("default_expected.json", [defaults(kind) for kind in kinds])


if __name__ == "__main__":
    main()
