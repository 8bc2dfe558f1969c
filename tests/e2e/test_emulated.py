"""The daemon on the emulated device, whose memory holds a quarter of the demo's experts, under a checker of races: every
placement of experts and KV answers as transformers does, through batches, cancels and preemptions."""

import concurrent.futures
import json
import os
import re
import subprocess

import openai
import pytest
import requests
from conftest import DEMO, MOED, ROOT, Daemon

RECORD = json.loads((ROOT / "tests/golden/demo_greedy.json").read_text())
PARIS = "What is the capital of France?"
# Flags, and what they make of /info's plan. 240 experts of 5 MiB; KV blocks of 0.35 MiB.
PLACEMENTS = {
    "hot": (["--device-memory-gib", "0.47"], {"policy": "hot", "kv": "host", "halves": 1, "resident_experts": 0}),
    "stream": (["--device-memory-gib", "0.47", "--policy", "stream", "--halves", "2"],
               {"policy": "stream", "kv": "host", "halves": 2, "resident_experts": 0}),
    "split": (["--device-memory-gib", "0.47", "--policy", "hot", "--kv", "split", "--device-kv-gib", "0.003", "--halves", "2",
               "--resident-experts", "1"], {"policy": "hot", "kv": "split", "halves": 2, "resident_experts": 30}),
    "device": (["--device-memory-gib", "1.5", "--policy", "device", "--device-kv-gib", "0.007"],
               {"policy": "device", "kv": "device", "halves": 1, "resident_experts": 240, "expert_slots": 240}),
}


@pytest.fixture(scope="module", params=PLACEMENTS)
def placed(request):
    """(name, daemon): KV for one context and a little more, so that requests together preempt each other."""
    flags, _ = PLACEMENTS[request.param]
    if request.param != "device":
        flags = [*flags, "--kv-gib", "0.007" if request.param != "split" else "0.006"]
    daemon = Daemon(MOED, DEMO, "--device", "emulated", "--deterministic", "--max-model-len", "256", "--pass-rows-max", "128",
                    *flags, ready_seconds=300)
    yield request.param, daemon
    assert daemon.stop() == 0, daemon.log


@pytest.fixture
def client(placed):
    with openai.OpenAI(base_url=placed[1].url + "/v1", api_key="none", max_retries=0, timeout=300) as made:
        yield made


def ask(client, question, **options):
    return client.chat.completions.create(model="", messages=[{"role": "user", "content": question}], **options)


def metric(daemon, name, label=""):
    lines = requests.get(daemon.url + "/metrics", timeout=30).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if re.match(rf"{name}\{{.*{label}", line))


def test_the_plan_is_told(placed):
    name, daemon = placed
    info = requests.get(daemon.url + "/info", timeout=30).json()
    assert info["plan"].items() >= PLACEMENTS[name][1].items()
    experts = info["plan"]["host_experts"]
    assert experts["refusal"] is None and experts["pinned_bytes"] >= experts["bytes"] > 0
    device = info["memory_budget"]["device"]
    assert sum(device[key] for key in device if key.endswith("_bytes") and key != "memory_bytes") <= device["memory_bytes"]
    if name != "device":
        assert 40 <= info["plan"]["expert_slots"] <= 70


def test_answers_equal_transformers(placed, client):
    recorded = [answer for answer in RECORD["answers"] if answer["prompt"] == PARIS or
                answer["compared"] == len(answer["tokens"])][:4]
    assert any(answer["prompt"] == PARIS for answer in recorded)
    with concurrent.futures.ThreadPoolExecutor(len(recorded)) as pool:
        answers = list(pool.map(lambda wanted: ask(client, wanted["prompt"], temperature=0, max_tokens=RECORD["max_tokens"]),
                                recorded))
    for answer, wanted in zip(answers, recorded):
        assert answer.choices[0].message.content == wanted["text"]


def test_together_cancelled_and_preempted(placed, client):
    _, daemon = placed
    preempted = metric(daemon, "vllm:num_preemptions_total")
    endless = {"max_tokens": 60, "logit_bias": {"2": -100}, "temperature": 0}
    with ask(client, "Count to a hundred.", stream=True, **endless) as stream:
        next(iter(stream))
    alone = ask(client, "Say hello 3.", **endless)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: ask(client, f"Say hello {number}.", **endless), range(4)))
    assert all(answer.usage.completion_tokens == 60 for answer in answers)
    assert answers[3].choices[0].message.content == alone.choices[0].message.content
    assert metric(daemon, "vllm:num_preemptions_total") > preempted
    assert ask(client, PARIS, temperature=0, max_tokens=32).choices[0].message.content == "The capital of France is Paris."


def test_experts_ran_where_the_policy_says(placed):
    name, daemon = placed
    on_host = metric(daemon, "moed:expert_requests_total", 'place="host"')
    on_device = metric(daemon, "moed:expert_requests_total", 'place="device"')
    assert on_device > 0 and (on_host > 0) == (name in ("hot", "split"))
    copied = metric(daemon, "moed:h2d_bytes_total")
    if name == "device":
        assert copied == 240 * 3 * 576 * 1536 * 2  # once, at start
    else:
        assert copied > metric(daemon, "moed:expert_cache_misses_total") > 0
    assert (metric(daemon, "moed:kv_blocks", 'pool="device"') > 0) == (name in ("split", "device"))


@pytest.mark.parametrize("flags, wanted", [
    (["--device", "emulated:machine.toml"], "cannot read this machine file"),
    (["--device", "emulated", "--device-memory-gib", "0.001"], "device memory is too small for the dense weights and one expert"),
    (["--device", "emulated", "--device-memory-gib", "0.1", "--ring-slots", "9"], "placement.ring_slots is 9, but the model has 8"),
    (["--device", "emulated", "--device-memory-gib", "0.1", "--ring-slots", "1"], "placement.ring_slots is 1, but"),
    (["--device", "emulated", "--device-memory-gib", "0.1", "--resident-experts", "1:4"], "the experts of a layer are 0 to 3"),
    (["--device", "simulated:machine.toml"], "cannot serve"),
    (["--device", "cpu", "--policy", "hot"], "placement.policy is hot, but device.device is cpu"),
    (["--policy", "hot"], "placement.policy is hot, but device.device has no memory of its own"),
])
def test_refusals(tiny_model, flags, wanted):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOED_")}
    done = subprocess.run([MOED, "serve", "--model", tiny_model, "--load-format", "dummy", "--kv-gib", "0.1", "--http-port",
                           "0", "--grpc-port", "0", *flags], env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and wanted in done.stdout + done.stderr, done.stdout + done.stderr
