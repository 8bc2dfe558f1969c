#!/usr/bin/env python3
"""Makes tests/golden/: tiny random checkpoints and what transformers computes from them. tests/golden/README.md has the
layout and derives the tolerances. Not part of the build; its results are committed. To run it:

  python3 -m venv V && V/bin/pip install torch==2.11.0 transformers==5.12.1 safetensors==0.8.0 numpy==2.4.6
  V/bin/python tools/make_goldens.py [case ...]
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

PINNED = {'torch': '2.11.0', 'transformers': '5.12.1'}
OUT = pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'golden'
ROUNDOFF = 2.0 ** -8  # of bf16, to nearest even
SIGMAS = 6.0
DRAWS = 48
PROMPT_TOKENS = (39, 23)
GREEDY_TOKENS = 16
CLEAR = 0.8  # router margin that a prompt's token is chosen for
LEGACY, MODERN = 'legacy', 'modern'  # spelling of rope and dtype

BASE = {'vocab_size': 128, 'hidden_size': 64, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 256,
        'hidden_act': 'silu', 'tie_word_embeddings': False, 'bos_token_id': 1, 'eos_token_id': 2, 'use_cache': True,
        'attention_dropout': 0.0}

# Per case: config.json beside BASE; `rope`; `spelling`; `shards`; `router`, the standard deviation of router logits.
CASES = {
    'llama': dict(
        config={'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'hidden_size': 72,
                'num_hidden_layers': 2, 'intermediate_size': 72, 'num_attention_heads': 9, 'num_key_value_heads': 3,
                'head_dim': 16,
                'attention_bias': True, 'mlp_bias': False, 'tie_word_embeddings': True},
        rope={'rope_type': 'llama3', 'rope_theta': 10000.0, 'factor': 8.0, 'low_freq_factor': 1.0,
              'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}, spelling=LEGACY),
    'mixtral': dict(
        config={'architectures': ['MixtralForCausalLM'], 'model_type': 'mixtral', 'hidden_size': 72,
                'num_hidden_layers': 2, 'intermediate_size': 24, 'num_attention_heads': 9, 'num_key_value_heads': 3,
                'head_dim': 8,
                'num_local_experts': 5, 'num_experts_per_tok': 2, 'sliding_window': None,
                'output_router_logits': False, 'router_jitter_noise': 0.0},
        rope={'rope_type': 'default', 'rope_theta': 50000.0}, spelling=LEGACY, router=3.0),
    'mixtral_linear': dict(
        config={'architectures': ['MixtralForCausalLM'], 'model_type': 'mixtral', 'hidden_size': 80,
                'num_hidden_layers': 2, 'intermediate_size': 24, 'num_attention_heads': 5, 'num_key_value_heads': 1,
                'head_dim': 16,
                'num_local_experts': 4, 'num_experts_per_tok': 1, 'sliding_window': None,
                'output_router_logits': False, 'router_jitter_noise': 0.0},
        rope={'rope_type': 'linear', 'rope_theta': 10000.0, 'factor': 2.5}, spelling=MODERN, shards=2, router=3.0),
    'olmoe': dict(
        config={'architectures': ['OlmoeForCausalLM'], 'model_type': 'olmoe', 'num_hidden_layers': 2,
                'hidden_size': 72, 'intermediate_size': 16, 'num_attention_heads': 3, 'num_key_value_heads': 3,
                'num_experts': 6, 'num_experts_per_tok': 3, 'norm_topk_prob': False, 'clip_qkv': 1.25,
                'attention_bias': False, 'pad_token_id': 0},
        rope={'rope_type': 'default', 'rope_theta': 10000.0}, spelling=MODERN, router=3.0),
    'qwen2_moe': dict(
        config={'architectures': ['Qwen2MoeForCausalLM'], 'model_type': 'qwen2_moe', 'num_hidden_layers': 3,
                'intermediate_size': 40, 'num_attention_heads': 3, 'num_key_value_heads': 1,
                'moe_intermediate_size': 16, 'hidden_size': 72, 'shared_expert_intermediate_size': 24,
                'num_experts': 6, 'num_experts_per_tok': 2,
                'norm_topk_prob': False, 'decoder_sparse_step': 2, 'mlp_only_layers': [], 'qkv_bias': True,
                'use_sliding_window': False, 'sliding_window': 4096, 'max_window_layers': 28,
                'output_router_logits': False},
        rope={'rope_type': 'default', 'rope_theta': 1000000.0}, spelling=MODERN, router=3.0),
    'qwen2_moe_norm': dict(
        config={'architectures': ['Qwen2MoeForCausalLM'], 'model_type': 'qwen2_moe', 'num_hidden_layers': 2,
                'intermediate_size': 64, 'num_attention_heads': 4, 'num_key_value_heads': 2,
                'moe_intermediate_size': 24, 'shared_expert_intermediate_size': 48, 'num_experts': 5,
                'num_experts_per_tok': 2,
                'norm_topk_prob': True, 'decoder_sparse_step': 1, 'mlp_only_layers': [1], 'tie_word_embeddings': True,
                'use_sliding_window': False, 'sliding_window': None, 'output_router_logits': False},
        rope={'rope_type': 'default', 'rope_theta': 10000.0}, spelling=LEGACY, router=3.0),
    'qwen3': dict(
        config={'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3', 'hidden_size': 72,
                'num_hidden_layers': 2, 'intermediate_size': 72, 'num_attention_heads': 3, 'num_key_value_heads': 1,
                'head_dim': 32,
                'attention_bias': False, 'use_sliding_window': False, 'sliding_window': None},
        rope={'rope_type': 'yarn', 'rope_theta': 10000.0, 'factor': 8.0, 'original_max_position_embeddings': 32,
              'attention_factor': 1.125, 'beta_fast': 24.0, 'beta_slow': 2.0}, spelling=MODERN),
    'qwen3_moe': dict(
        config={'architectures': ['Qwen3MoeForCausalLM'], 'model_type': 'qwen3_moe', 'hidden_size': 72,
                'num_hidden_layers': 2, 'intermediate_size': 56, 'num_attention_heads': 3, 'num_key_value_heads': 1,
                'head_dim': 32,
                'moe_intermediate_size': 24, 'num_experts': 7, 'num_experts_per_tok': 3, 'norm_topk_prob': True,
                'decoder_sparse_step': 1, 'mlp_only_layers': [0], 'attention_bias': False,
                'use_sliding_window': False, 'sliding_window': None, 'output_router_logits': False},
        rope={'type': 'yarn', 'rope_theta': 10000.0, 'factor': 4.0, 'original_max_position_embeddings': 64},
        spelling=LEGACY, shards=2, router=3.0),
}


class Shape:
    """What the reference forward pass must know of a case."""

    def __init__(self, case):
        config = BASE | case['config']
        kind = config['model_type']
        self.kind, self.config = kind, config
        self.hidden, self.vocab = config['hidden_size'], config['vocab_size']
        self.heads, self.kv_heads = config['num_attention_heads'], config['num_key_value_heads']
        self.head_dim = config.get('head_dim') or self.hidden // self.heads
        self.layers = config['num_hidden_layers']
        self.experts = config.get('num_local_experts') or config.get('num_experts') or 0
        self.top_k = config.get('num_experts_per_tok', 0)
        self.renormalize = kind == 'mixtral' or config.get('norm_topk_prob', False)
        self.qkv_bias = kind == 'qwen2_moe' or config.get('attention_bias', False)
        self.output_bias = kind == 'llama' and config['attention_bias']
        self.qk_norm = {'qwen3': 'head', 'qwen3_moe': 'head', 'olmoe': 'whole'}.get(kind)
        self.clip = config.get('clip_qkv')
        self.shared = kind == 'qwen2_moe'
        self.moe_layers = [i for i in range(self.layers) if self.experts and i not in config.get('mlp_only_layers', [])
                           and (i + 1) % config.get('decoder_sparse_step', 1) == 0]
        self.expert_size = config.get('moe_intermediate_size', config['intermediate_size'])
        self.moe = 'block_sparse_moe' if kind == 'mixtral' else 'mlp'
        self.parts = ('w1', 'w3', 'w2') if kind == 'mixtral' else ('gate_proj', 'up_proj', 'down_proj')


def make_weights(shape, router_scale, rng):
    """The checkpoint's tensors by name, bf16. Experts are drawn apart from one another."""
    weights = {}

    def put(name, *dims, scale, mean=0.0):
        values = mean + scale * rng.standard_normal(dims)
        weights[name] = torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)

    def matrix(name, rows, columns, gain=1.0):
        put(name + '.weight', rows, columns, scale=gain / np.sqrt(columns))

    def norm(name, size):
        put(name + '.weight', size, scale=0.2, mean=1.0)

    def mlp(prefix, size, parts=('gate_proj', 'up_proj', 'down_proj')):
        matrix(f'{prefix}.{parts[0]}', size, shape.hidden, 1.5)
        matrix(f'{prefix}.{parts[1]}', size, shape.hidden, 1.5)
        matrix(f'{prefix}.{parts[2]}', shape.hidden, size)

    put('model.embed_tokens.weight', shape.vocab, shape.hidden, scale=1.0)
    for layer in range(shape.layers):
        prefix = f'model.layers.{layer}'
        norm(prefix + '.input_layernorm', shape.hidden)
        norm(prefix + '.post_attention_layernorm', shape.hidden)
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        for letter, size in (('q', q), ('k', kv), ('v', kv)):
            matrix(f'{prefix}.self_attn.{letter}_proj', size, shape.hidden, 1.3)
            if shape.qkv_bias:
                put(f'{prefix}.self_attn.{letter}_proj.bias', size, scale=0.4)
        matrix(prefix + '.self_attn.o_proj', shape.hidden, q)
        if shape.output_bias:
            put(prefix + '.self_attn.o_proj.bias', shape.hidden, scale=0.4)
        if shape.qk_norm:
            norm(prefix + '.self_attn.q_norm', shape.head_dim if shape.qk_norm == 'head' else q)
            norm(prefix + '.self_attn.k_norm', shape.head_dim if shape.qk_norm == 'head' else kv)
        if layer not in shape.moe_layers:
            mlp(prefix + '.mlp', shape.config['intermediate_size'])
            continue
        moe = f'{prefix}.{shape.moe}'
        matrix(moe + '.gate', shape.experts, shape.hidden, router_scale)
        for expert in range(shape.experts):
            mlp(f'{moe}.experts.{expert}', shape.expert_size, shape.parts)
        if shape.shared:
            mlp(moe + '.shared_expert', shape.config['shared_expert_intermediate_size'])
            matrix(moe + '.shared_expert_gate', 1, shape.hidden, 1.5)
    norm('model.norm', shape.hidden)
    if not shape.config['tie_word_embeddings']:
        matrix('lm_head', shape.vocab, shape.hidden, 1.5)
    return weights


def write_checkpoint(folder, case, weights):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config, rope = BASE | case['config'], dict(case['rope'])
    if case['spelling'] == MODERN:
        config |= {'rope_parameters': rope, 'dtype': 'bfloat16'}
    else:
        config |= {'rope_theta': rope.pop('rope_theta'), 'torch_dtype': 'bfloat16'}
        config['rope_scaling'] = None if rope.get('rope_type') == 'default' else rope
    (folder / 'config.json').write_text(json.dumps(config, indent=1) + '\n')
    shards = case.get('shards', 1)
    if shards == 1:
        save_file(weights, folder / 'model.safetensors', {'format': 'pt'})
        return
    names, where = list(weights), {}
    for shard in range(shards):
        file = f'model-{shard + 1:05}-of-{shards:05}.safetensors'
        chosen = names[shard::shards]  # neighbours in different files
        save_file({name: weights[name] for name in chosen}, folder / file, {'format': 'pt'})
        where |= {name: file for name in chosen}
    index = {'metadata': {'total_size': sum(2 * w.numel() for w in weights.values())}, 'weight_map': where}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=0) + '\n')


class Reference:
    """The forward pass in fp32, batched, with a hook at every point where the engine rounds to bf16."""

    def __init__(self, shape, weights, rotary):
        self.shape = shape
        self.weights = {name: value.float() for name, value in weights.items()}
        self.rotary = rotary
        self.noise = None

    def rounded(self, x):
        if self.noise is None:
            return x
        return x * (1 + ROUNDOFF * (2 * torch.rand(x.shape, generator=self.noise) - 1))

    def norm(self, x, name):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.shape.config['rms_norm_eps'])
        return x * self.weights[name + '.weight']

    def linear(self, x, name):
        y = x @ self.weights[name + '.weight'].T
        bias = self.weights.get(name + '.bias')
        return y if bias is None else y + bias

    def heads(self, x, prefix, letter, count):
        """Projection, norm, clip, rope: [batch, heads, positions, head_dim]."""
        shape = self.shape
        y = self.linear(x, f'{prefix}.{letter}_proj')
        if shape.qk_norm == 'whole' and letter != 'v':
            y = self.norm(y, f'{prefix}.{letter}_norm')
        if shape.clip:
            y = y.clamp(-shape.clip, shape.clip)
        y = y.view(*y.shape[:2], count, shape.head_dim)
        if shape.qk_norm == 'head' and letter != 'v':
            y = self.norm(y, f'{prefix}.{letter}_norm')
        y = y.transpose(1, 2)
        if letter != 'v':
            angles = torch.arange(y.shape[2])[:, None] * self.rotary.inv_freq[None, :]
            cos, sin = (torch.cat((f(angles),) * 2, -1) * self.rotary.attention_scaling for f in (torch.cos, torch.sin))
            low, high = y.chunk(2, -1)
            y = y * cos + torch.cat((-high, low), -1) * sin
        return self.rounded(y)

    def attention(self, x, prefix):
        shape, length = self.shape, x.shape[1]
        q = self.heads(x, prefix, 'q', shape.heads)
        k, v = (self.heads(x, prefix, letter, shape.kv_heads) for letter in 'kv')
        k, v = (t.repeat_interleave(shape.heads // shape.kv_heads, 1) for t in (k, v))
        scores = q @ k.transpose(2, 3) / shape.head_dim ** 0.5
        scores = scores + torch.full((length, length), -torch.inf).triu(1)
        out = self.rounded(scores.softmax(-1)) @ v
        out = out.transpose(1, 2).reshape(*x.shape[:2], shape.heads * shape.head_dim)
        return self.linear(self.rounded(out), prefix + '.o_proj')

    def mlp(self, x, prefix, parts=('gate_proj', 'up_proj', 'down_proj')):
        gate, up, down = (f'{prefix}.{part}' for part in parts)
        return self.linear(self.rounded(torch.nn.functional.silu(self.linear(x, gate)) * self.linear(x, up)), down)

    def moe(self, x, prefix, routers):
        shape = self.shape
        logits = self.linear(x, prefix + '.gate')
        routers.append(logits)
        scores, chosen = logits.softmax(-1).topk(shape.top_k, -1)
        if shape.renormalize:
            scores = scores / scores.sum(-1, keepdim=True)
        weights = torch.zeros_like(logits).scatter(-1, chosen, scores)
        y = sum(weights[..., e, None] * self.mlp(x, f'{prefix}.experts.{e}', shape.parts) for e in range(shape.experts))
        if shape.shared:
            weight = torch.sigmoid(self.linear(x, prefix + '.shared_expert_gate'))
            y = y + weight * self.mlp(x, prefix + '.shared_expert')
        return y

    def __call__(self, tokens, noise=None):
        """tokens [batch, positions] -> logits [batch, positions, vocab], router logits of each MoE layer."""
        self.noise, routers = noise, []
        x = self.weights['model.embed_tokens.weight'][tokens]
        for layer in range(self.shape.layers):
            prefix = f'model.layers.{layer}'
            x = x + self.attention(self.rounded(self.norm(x, prefix + '.input_layernorm')), prefix + '.self_attn')
            y = self.rounded(self.norm(x, prefix + '.post_attention_layernorm'))
            if layer in self.shape.moe_layers:
                x = x + self.moe(y, f'{prefix}.{self.shape.moe}', routers)
            else:
                x = x + self.mlp(y, prefix + '.mlp')
        head = 'model.embed_tokens' if self.shape.config['tie_word_embeddings'] else 'lm_head'
        return self.linear(self.rounded(self.norm(x, 'model.norm')), head), routers


def margins_of(routers, top_k, experts):
    """[batch, layers, positions]: gap between the last chosen and the first refused expert, in router logits."""
    if not routers or top_k >= experts:
        return None
    values = torch.stack([r.sort(-1, descending=True).values for r in routers], 1)
    return values[..., top_k - 1] - values[..., top_k]


def errors_of(reference, tokens, seed, draws):
    """Bounds of the logits' and of the router margins' errors by rounding: [positions], [layers, positions]."""
    clean, clean_routers = reference(tokens[None])
    noise = torch.Generator().manual_seed(seed)
    logits, routers = reference(tokens[None].expand(draws, -1), noise)

    def sigma(noisy, exact):
        return (noisy - exact).pow(2).mean(0).sqrt().max(-1).values

    logit = SIGMAS * sigma(logits, clean)
    router = [SIGMAS * 2 ** 0.5 * sigma(a, b) for a, b in zip(routers, clean_routers)]
    return logit, torch.stack(router) if router else None


def choose_prompt(reference, length, rng):
    """Random tokens, each such that no router is in doubt at its position (rows before it never change)."""
    shape, tokens = reference.shape, torch.empty(0, dtype=torch.long)
    while len(tokens) < length:
        candidates = torch.from_numpy(rng.permutation(shape.vocab)[:16])
        batch = torch.cat((tokens[None].expand(len(candidates), -1), candidates[:, None]), 1)
        margins = margins_of(reference(batch)[1], shape.top_k, shape.experts)
        best = 0
        if margins is not None:
            worst = margins[:, :, -1].amin(1)
            enough = (worst > CLEAR).nonzero()
            best = int(enough[0]) if len(enough) else int(worst.argmax())
        tokens = batch[best]
    return tokens


def continue_greedily(reference, batch):
    for _ in range(GREEDY_TOKENS):
        logits = reference(batch)[0][:, -1]
        batch = torch.cat((batch, logits.argmax(-1, keepdim=True)), 1)
    return batch


def choose_end(reference, tokens, seed):
    """Replaces the last token by the one whose greedy continuation stays clear of ties longest."""
    shape, length = reference.shape, len(tokens)
    candidates = torch.arange(shape.vocab)
    batch = torch.cat((tokens[None, :-1].expand(shape.vocab, -1), candidates[:, None]), 1)
    margins = margins_of(reference(batch)[1], shape.top_k, shape.experts)
    if margins is not None:
        batch = batch[(margins[:, :, -1].amin(1) > CLEAR).nonzero()[:, 0]]
    batch = continue_greedily(reference, batch[:16])
    runs = [measure(reference, sequence, length, seed, DRAWS // 6)['greedy_compared'].item() for sequence in batch]
    return batch[int(np.argmax(runs))]


def measure(reference, sequence, length, seed, draws=DRAWS):
    """Everything expected of one prompt and its greedy continuation, by the reference."""
    shape = reference.shape
    inputs = sequence[:-1]
    logits, routers = reference(inputs[None])
    logit_error, router_error = errors_of(reference, inputs, seed, draws)
    clear = torch.ones(len(inputs), dtype=torch.bool)
    result = {'tokens': sequence[:length].int(), 'logits': logits[0, :length], 'logit_tolerance': logit_error[:length]}
    margins = margins_of(routers, shape.top_k, shape.experts)
    if margins is not None:
        chosen = torch.stack([r[0].topk(shape.top_k, -1).indices for r in routers])
        clear = (margins[0] > router_error).all(0).cumprod(0).bool()
        result |= {'experts': chosen[:, :length].int(), 'router_margin': margins[0, :, :length],
                   'router_error': router_error[:, :length]}
    best = logits[0, length - 1:].topk(2, -1).values
    gap = best[:, 0] - best[:, 1]
    tolerance = logit_error[length - 1:]
    sure = ((gap > 2 * tolerance) & clear[length - 1:]).int().cumprod(0)
    return result | {'compared': clear[:length].int(), 'greedy_tokens': sequence[length:].int(), 'greedy_margin': gap,
                     'greedy_tolerance': tolerance, 'greedy_compared': sure.sum().int()[None]}


def logits_by_transformers(folder, tokens, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation='eager').eval()
    with torch.no_grad():
        return model(tokens[None].long()).logits[0], model.model.rotary_emb


def check_mutations(name, reference, prompts):
    """The bounds must notice wrong engines: experts swapped, a bias lost, every position's rope off."""
    shape, weights = reference.shape, dict(reference.weights)

    def caught(changes):
        reference.weights = weights | changes
        found = any(((reference(p['tokens'][None].long())[0][0] - p['logits']).abs().amax(-1)
                     > p['logit_tolerance'])[p['compared'].bool()].any() for p in prompts)
        reference.weights = weights
        return found

    mutations = {}
    for layer in shape.moe_layers:
        for expert in range(shape.experts - 1):
            pair = [f'model.layers.{layer}.{shape.moe}.experts.{e}.' for e in (expert, expert + 1)]
            swap = {pair[a] + key[len(pair[b]):]: value for a, b in ((0, 1), (1, 0)) for key, value in weights.items()
                    if key.startswith(pair[b])}
            mutations[f'experts {expert} and {expert + 1} of layer {layer} swapped'] = swap
    for key, value in weights.items():
        if key.endswith('.bias') and '.k_proj.' not in key or key.endswith(('_norm.weight', 'norm.weight')):
            mutations[key + ' ignored'] = {key: torch.full_like(value, 0.0 if key.endswith('.bias') else 1.0)}
    for mutation, changes in mutations.items():
        if not caught(changes):
            raise SystemExit(f'{name}: not noticed: {mutation}')
    return len(mutations)


def make_case(name, case, number):
    shape, folder = Shape(case), OUT / name
    rng = np.random.default_rng([2025, number])
    weights = make_weights(shape, case.get('router', 1.0), rng)
    write_checkpoint(folder, case, weights)
    _, rotary = logits_by_transformers(folder, torch.zeros(2), torch.float32)
    reference = Reference(shape, weights, rotary)
    prompts, expected, worst_bf16 = [], {}, 0.0
    for index, length in enumerate(PROMPT_TOKENS):
        sequence = choose_end(reference, choose_prompt(reference, length, rng), number)
        prompt = measure(reference, sequence, length, number)
        exact, _ = logits_by_transformers(folder, sequence[:length], torch.float32)
        difference = (exact - prompt['logits']).abs().max().item()
        if difference > 1e-4:
            raise SystemExit(f'{name}: the reference differs from transformers by {difference:.2e}')
        rough, _ = logits_by_transformers(folder, sequence[:length], torch.bfloat16)
        worst_bf16 = max(worst_bf16, ((rough.float() - exact).abs().amax(-1) / prompt['logit_tolerance']).max().item())
        prompts.append(prompt)
        prompt['logits'] = exact
        stored = {k: v for k, v in prompt.items() if k != 'logits'} | {'logits_fp32': exact}
        if index == 1:
            stored['logits_bf16'] = rough
        expected |= {f'prompt{index}.{key}': value.clone() for key, value in stored.items()}
    rows, excluded = sum(PROMPT_TOKENS), sum(int((1 - p['compared']).sum()) for p in prompts)
    if excluded > 0.02 * rows:
        raise SystemExit(f'{name}: {excluded} of {rows} rows excluded')
    noticed = check_mutations(name, reference, prompts)
    save_file(expected, folder / 'expected.safetensors',
              {**PINNED, 'rows': str(rows), 'rows_excluded': str(excluded),
               'moe_layers': ','.join(map(str, shape.moe_layers))})
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f'{name}: {size} bytes, logits std {prompts[0]["logits"].std():.2f}, tolerance '
          f'{prompts[0]["logit_tolerance"].median():.4f}, {excluded}/{rows} rows excluded, greedy compared '
          f'{[p["greedy_compared"].item() for p in prompts]}, transformers bf16 {worst_bf16:.2f} tolerances, '
          f'{noticed} mutations noticed', flush=True)


def main():
    for package, module in (('torch', torch), ('transformers', transformers)):
        if module.__version__.split('+')[0] != PINNED[package]:
            raise SystemExit(f'{package} is {module.__version__}, wanted {PINNED[package]}')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)  # the products are tiny
    for number, (name, case) in enumerate(CASES.items()):
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            make_case(name, case, number)


if __name__ == '__main__':
    main()
