"""Starts daemons for the end-to-end tests: on free ports, with the ports read from the line that says it is ready.

MOED_BINARY        the daemon (default build/release/server/moed)
MOED_FAKE_BINARY   the same over an engine without a model (default build/release/tests/server/moed_fake)
MOED_DEMO          the demo model's folder (default models/demo)
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOED = Path(os.environ.get("MOED_BINARY", ROOT / "build/release/server/moed"))
FAKE = Path(os.environ.get("MOED_FAKE_BINARY", ROOT / "build/release/tests/server/moed_fake"))
DEMO = Path(os.environ.get("MOED_DEMO", ROOT / "models/demo"))
READY = re.compile(r"ready: http (\S+):(\d+), grpc (\S+):(\d+)")
LOADING = re.compile(r"loading .*; http (\S+):(\d+), grpc (\S+):(\d+)")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Daemon:
    """A daemon under test, waited for until it says `said`. `log` holds what it wrote so far."""

    def __init__(self, binary, model, *flags, said=READY, ready_seconds=120, **environment):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MOED_")}
        self.log = ""
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [str(binary), "serve", "--model", str(model), "--http-port", "0", "--grpc-port", "0", *flags],
            env=clean | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        threading.Thread(target=self._read, daemon=True).start()
        match = self.wait_log(said, ready_seconds)
        self.http_port, self.grpc_port = int(match[2]), int(match[4])
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.grpc_target = f"127.0.0.1:{self.grpc_port}"

    def _read(self):
        for line in self.process.stdout:
            with self._news:
                self.log += line
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_log(self, pattern, seconds=10):
        """The match of `pattern` in the log, once it is there."""
        end = time.monotonic() + seconds
        with self._news:
            while True:
                if match := re.search(pattern, self.log):
                    return match
                left = end - time.monotonic()
                gone = self.process.poll() is not None
                if left <= 0 or gone:
                    if gone and (match := re.search(pattern, self.log)):
                        return match
                    self.process.kill()
                    raise AssertionError(f"no {pattern!r} in the daemon's log:\n{self.log}")
                self._news.wait(min(left, 0.2))

    def stop(self, seconds=60):
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the daemon did not stop:\n{self.log}") from None


def byte_characters():
    """The character by which byte-level BPE spells each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelling, extra = {}, 0
    for byte in range(256):
        if byte in printable:
            spelling[byte] = chr(byte)
        else:
            spelling[byte] = chr(0x100 + extra)
            extra += 1
    return spelling


def write_tiny_model(folder):
    """A checkpoint without weights: one token a byte (id = byte), then <eos> (256) and words that merges make."""
    vocabulary = {character: byte for byte, character in byte_characters().items()}
    vocabulary["<eos>"] = 256
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    special = {"id": 256, "content": "<eos>", "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}
    for index, (left, right) in enumerate(merges):
        vocabulary[left + right] = 257 + index
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocabulary, "merges": [list(pair) for pair in merges]},
    }
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 261, "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "sliding_window": None, "eos_token_id": 256, "bos_token_id": None, "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def start_fake(tiny_model):
    """start_fake("--flag", ..., FAKE_LAYER_US="100"): a daemon of this test alone."""
    daemons = []

    def start(*flags, model=tiny_model, **options):
        daemons.append(Daemon(FAKE, model, *flags, **options))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.stop()


@pytest.fixture(scope="session")
def fake(tiny_model):
    """A daemon over the fake engine that tests share."""
    daemon = Daemon(FAKE, tiny_model, FAKE_LAYER_US="200")
    yield daemon
    assert daemon.stop() == 0, daemon.log


# The emulated device holds a quarter of the demo's experts, under a checker of races.
DEMO_DEVICES = {"cpu": ["--device", "cpu"], "emulated": ["--device", "emulated", "--device-memory-gib", "0.47"]}


@pytest.fixture(scope="session", params=DEMO_DEVICES)
def demo(request):
    """The real daemon over the demo model, on each device."""
    if not (DEMO / "config.json").exists():
        subprocess.run([sys.executable, ROOT / "tools/make_demo.py", "--out", DEMO], check=True)
    daemon = Daemon(MOED, DEMO, "--kv-gib", "1", *DEMO_DEVICES[request.param], ready_seconds=300)
    yield daemon
    assert daemon.stop() == 0, daemon.log


@pytest.fixture(scope="session")
def moed_pb(tmp_path_factory):
    """(messages, stubs) of proto/moed.proto, made by grpcio-tools."""
    from grpc_tools import protoc

    out = tmp_path_factory.mktemp("stubs")
    arguments = ["protoc", f"--proto_path={ROOT / 'proto'}", f"--python_out={out}", f"--grpc_python_out={out}", "moed.proto"]
    assert protoc.main(arguments) == 0
    sys.path.insert(0, str(out))
    try:
        return importlib.import_module("moed_pb2"), importlib.import_module("moed_pb2_grpc")
    finally:
        sys.path.remove(str(out))
