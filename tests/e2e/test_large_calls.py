"""Calls within the limits of size that could still cost much more than their bytes."""

import re
from pathlib import Path

import grpc
import pytest
import requests


def peak_mib(daemon):
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{daemon.process.pid}/status").read_text())[1]) >> 10


def test_a_list_is_held_once_however_many_prompts_share_it(start_fake):
    daemon = start_fake()
    before = peak_mib(daemon)
    body = {"prompt": ["a"] * 1024, "allowed_token_ids": [5] * 250_000, "max_tokens": 1}
    answer = requests.post(daemon.url + "/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 1024
    assert peak_mib(daemon) - before < 300, "a copy a prompt would be a GiB"


def test_scores_of_a_prompt_are_not_multiplied_beyond_a_limit(start_fake):
    daemon = start_fake("--scores-max", "100000")
    body = {"prompt": "x" * 500, "max_tokens": 1, "echo": True, "logprobs": 5}
    assert requests.post(daemon.url + "/v1/completions", json=body | {"n": 8}, timeout=60).status_code == 200
    refused = requests.post(daemon.url + "/v1/completions", json=body | {"n": 64}, timeout=60)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "logprobs"
    assert "192384" in refused.text and "100000 (limits.scores_max)" in refused.text


def test_a_batch_that_cannot_wait_is_no_429(start_fake):
    daemon = start_fake("--queue-max", "4")
    answers = [requests.post(daemon.url + "/v1/completions", json={"prompt": ["a"] * count, "max_tokens": 1}, timeout=30)
               for count in (4, 5)]
    assert [answer.status_code for answer in answers] == [200, 400]
    assert answers[1].json()["error"]["param"] == "prompt" and "scheduler.queue_max" in answers[1].text


def test_who_goes_first_is_the_operators_choice(start_fake):
    daemon = start_fake("--scheduling-policy", "priority")
    body = {"prompt": "a", "max_tokens": 1, "priority": -5}
    assert requests.post(daemon.url + "/v1/completions", json=body, timeout=30).status_code == 200


def test_long_names_of_models_are_cut(fake, moed_pb):
    pb, services = moed_pb
    name = "no\nsuch " + "m" * 20_000
    answer = requests.post(fake.url + "/v1/completions", json={"model": name, "prompt": "a"}, timeout=10)
    assert answer.status_code == 404 and len(answer.content) < 1000
    assert "`no\\x0asuch mmm" in answer.json()["error"]["message"]
    with grpc.insecure_channel(fake.grpc_target) as channel, pytest.raises(grpc.RpcError) as caught:
        list(services.InferenceStub(channel).Generate(pb.GenerateRequest(model=name, text="a"), timeout=10))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == answer.json()["error"]["message"]
