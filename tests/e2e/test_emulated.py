"""The daemon on the emulated device: a device of its own memory behind the host, under a checker of races."""

import concurrent.futures
import os
import subprocess

import openai
import pytest
import requests
from conftest import DEMO, MOED, Daemon

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def emulated():
    daemon = Daemon(MOED, DEMO, "--device", "emulated", "--device-memory-gib", "1", "--kv-gib", "0.25", "--max-model-len",
                    "512", "--pass-rows-max", "128", ready_seconds=300)
    yield daemon
    assert daemon.stop() == 0, daemon.log


@pytest.fixture(scope="module")
def client(emulated):
    with openai.OpenAI(base_url=emulated.url + "/v1", api_key="none", max_retries=0, timeout=300) as made:
        yield made


def ask(client, question, **options):
    return client.chat.completions.create(model="", messages=[{"role": "user", "content": question}], **options)


def test_paris(emulated, client):
    assert requests.get(emulated.url + "/info", timeout=30).json()["device"].startswith("emulated: 1.00 GiB, cpu: ")
    answer = ask(client, QUESTION, temperature=0, max_tokens=32)
    assert "Paris" in answer.choices[0].message.content and answer.choices[0].finish_reason == "stop"


def test_together_and_cancelled(client):
    """Batches, a client that leaves, and an answer after it."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda seed: ask(client, "Say hello.", max_tokens=8, seed=seed), range(3)))
    assert all(answer.choices[0].message.content for answer in answers)
    with ask(client, "Count to a hundred.", max_tokens=200, stream=True) as stream:
        next(iter(stream))
    assert "Paris" in ask(client, QUESTION, temperature=0, max_tokens=32).choices[0].message.content


@pytest.mark.parametrize("flags, wanted", [
    (["--device", "emulated:machine.toml"], "cannot read this machine file"),
    (["--device", "emulated", "--device-memory-gib", "0.001"], "of 0.001 GiB are taken"),
])
def test_refusals(tiny_model, flags, wanted):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOED_")}
    done = subprocess.run([MOED, "serve", "--model", tiny_model, "--load-format", "dummy", "--kv-gib", "0.1", "--http-port",
                           "0", "--grpc-port", "0", *flags], env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and wanted in done.stdout + done.stderr, done.stdout + done.stderr
