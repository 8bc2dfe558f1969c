"""What `moed serve` says of a checkpoint, a setting or a port that it cannot use: one line and an exit status, at once."""

import json
import os
import socket
import struct
import subprocess
import time

import pytest
import requests
from conftest import MOED, Daemon, write_tiny_model

LINE_SECONDS = 20


def tensors_of(config):
    """Names and shapes of a Mixtral checkpoint."""
    hidden, inner, experts, vocabulary = (config[name] for name in
                                          ("hidden_size", "intermediate_size", "num_local_experts", "vocab_size"))
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "lm_head.weight": [vocabulary, hidden],
              "model.norm.weight": [hidden]}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": [hidden], at + "post_attention_layernorm.weight": [hidden],
                   at + "self_attn.q_proj.weight": [queries, hidden], at + "self_attn.k_proj.weight": [keys, hidden],
                   at + "self_attn.v_proj.weight": [keys, hidden], at + "self_attn.o_proj.weight": [hidden, queries],
                   at + "block_sparse_moe.gate.weight": [experts, hidden]}
        for expert in range(experts):
            inside = f"{at}block_sparse_moe.experts.{expert}."
            shapes |= {inside + "w1.weight": [inner, hidden], inside + "w2.weight": [hidden, inner], inside + "w3.weight": [inner, hidden]}
    return shapes


def safetensors(shapes, change=None):
    """Zeros in bfloat16; `change` may lie about the header."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    if change:
        change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


@pytest.fixture
def model(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").write_bytes(safetensors(tensors_of(config)))
    return folder


def refused(*flags, said=(), **environment):
    """Runs the daemon, which must end by itself with status 1 (2: of flags); its last line must hold all of `said`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOED_")}
    begin = time.monotonic()
    done = subprocess.run([str(MOED), "serve", "--http-port", "0", "--grpc-port", "0", "--kv-gib", "0.1", *map(str, flags)],
                          env=clean | environment, capture_output=True, text=True, timeout=60, check=False)
    assert time.monotonic() - begin < LINE_SECONDS
    line = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    assert done.returncode in (1, 2) and line.startswith("moed: "), (done.returncode, done.stdout, done.stderr)
    for words in said:
        assert words in line, line
    return line


def change_config(model, **fields):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))


def test_the_whole_checkpoint_serves(model):
    """The control: what the tests below break."""
    daemon = Daemon(MOED, model, "--kv-gib", "0.1")
    try:
        answer = requests.post(daemon.url + "/v1/completions", json={"prompt": "hello", "max_tokens": 2}, timeout=30)
        assert answer.status_code == 200, answer.text
    finally:
        assert daemon.stop() == 0, daemon.log


def test_weights_that_are_no_numbers(model):
    """Every answer is an error that says why, and the daemon goes on."""
    file = model / "model.safetensors"
    whole = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", whole[:8])
    begin, _ = json.loads(whole[8:8 + size])["lm_head.weight"]["data_offsets"]
    whole[8 + size + begin:8 + size + begin + 2] = struct.pack("<H", 0x7FC0)
    file.write_bytes(whole)
    daemon = Daemon(MOED, model, "--kv-gib", "0.1")
    try:
        for more in ({}, {"logprobs": 1, "temperature": 0}):
            answer = requests.post(daemon.url + "/v1/completions", json={"prompt": "hello", "max_tokens": 2} | more, timeout=30)
            assert answer.status_code == 500 and "NaN" in answer.json()["error"]["message"], answer.text
        assert requests.get(daemon.url + "/health", timeout=10).status_code == 200
    finally:
        assert daemon.stop() == 0, daemon.log


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file(model, file):
    (model / file).unlink()
    said = ["safetensors"] if file == "model.safetensors" else [file]
    refused("--model", model, said=said)


def test_no_folder(tmp_path):
    refused("--model", tmp_path / "nowhere", said=["nowhere"])
    refused(said=["model"])


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.5, -1])
def test_truncated_safetensors(model, keep):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:int(keep * len(whole)) if isinstance(keep, float) else keep])
    refused("--model", model, said=["model.safetensors"])


def set_entry(name, **fields):
    return lambda header: header[name].update(fields)


LIES = {
    "beyond the end": set_entry("model.norm.weight", data_offsets=[0, 1 << 60]),
    "backwards": set_entry("model.norm.weight", data_offsets=[128, 0]),
    "shape": set_entry("model.norm.weight", shape=[65]),
    "huge shape": set_entry("model.norm.weight", shape=[1 << 40, 1 << 40]),
    "negative shape": set_entry("model.norm.weight", shape=[-64]),
    "dtype": set_entry("model.norm.weight", dtype="BF17"),
    "hole": lambda header: header.pop("lm_head.weight"),
    "not an object": lambda header: header.update({"model.norm.weight": 5}),
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_that_lie(model, lie):
    config = json.loads((model / "config.json").read_text())
    (model / "model.safetensors").write_bytes(safetensors(tensors_of(config), LIES[lie]))
    refused("--model", model, said=["model.safetensors"])


def test_a_tensor_that_is_missing_or_of_another_shape(model):
    shapes = tensors_of(json.loads((model / "config.json").read_text()))
    for name in ("lm_head.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"):
        without = {key: shape for key, shape in shapes.items() if key != name}
        (model / "model.safetensors").write_bytes(safetensors(without))
        refused("--model", model, said=[name])
        (model / "model.safetensors").write_bytes(safetensors(shapes | {name: [7, 9]}))
        refused("--model", model, said=[name, "7"])


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 1 << 27])
def test_a_header_that_claims_to_be_huge(model, length):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(1000))
    refused("--model", model, said=["model.safetensors"])


@pytest.mark.parametrize("field, value", [
    ("hidden_size", 1 << 40), ("hidden_size", -64), ("hidden_size", 0), ("hidden_size", "64"), ("hidden_size", 64.5),
    ("num_hidden_layers", 1 << 31), ("num_hidden_layers", 0), ("vocab_size", 1 << 50), ("vocab_size", 0), ("head_dim", 1 << 30),
    ("num_local_experts", 1 << 30), ("num_experts_per_tok", 5), ("num_experts_per_tok", 0), ("num_attention_heads", 3),
    ("num_key_value_heads", 0), ("max_position_embeddings", 1 << 62), ("intermediate_size", 1 << 40), ("rms_norm_eps", -1),
    ("rope_theta", 0), ("hidden_act", "sigmoid"), ("architectures", ["GptForCausalLM"]), ("architectures", []),
])
def test_configs_of_absurd_sizes(model, field, value):
    """Refused by name, for dummy weights too, before memory is taken for them."""
    change_config(model, **{field: value})
    for extra in ([], ["--load-format", "dummy"]):
        line = refused("--model", model, *extra)
        assert field.removesuffix("s") in line or "memory" in line or "head" in line, line


def test_a_config_that_is_no_json(model):
    for text in ("", "{", "[]", "[" * 100_000, '{"hidden_size": NaN}', "\xff"):
        (model / "config.json").write_bytes(text.encode("latin-1"))
        refused("--model", model, said=["config.json"])


def test_a_template_that_is_none(model):
    (model / "chat_template.jinja").write_text("{% for x in %}")
    refused("--model", model, said=["chat_template.jinja"])


def test_ports_in_use(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused("--model", model, "--http-port", port, said=[str(port), "cannot listen"])
        refused("--model", model, "--grpc-port", port, said=[str(port), "gRPC"])


def test_settings_that_are_wrong(model, tmp_path):
    config = tmp_path / "moed.toml"
    for text, said in [("[limits]\nn_maxx = 5\n", ["n_maxx", "n_max", "moed.toml:2"]),
                       ("[limits]\nn_max = 0\n", ["limits.n_max", "moed.toml:2", "1"]),
                       ("[limits]\nn_max = 'x'\n", ["limits.n_max"]), ("[nothing]\nx = 1\n", ["nothing"]), ("[limits\n", ["moed.toml"])]:
        config.write_text(text)
        refused("--model", model, "--config", config, said=said)
    refused("--model", model, "--config", tmp_path / "none.toml", said=["none.toml"])
    refused("--model", model, "--n-maxx", "5", said=["--n-maxx", "--n-max"])
    refused("--model", model, "--n-max", "99999999999999999999", said=["n-max"])
    refused("--model", model, said=["MOED_N_MAX"], MOED_N_MAX="many")
    refused("--model", model, "--host", "0.0.0.0", said=["key"])
    refused("--model", model, "--api-key-file", tmp_path / "keys", said=["keys"])
