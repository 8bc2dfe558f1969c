"""The counters at /metrics against what known requests must have added to them."""

import re
import time

import requests

PROMPT = "counts: " + "x" * 32  # 40 tokens, two full blocks of the KV cache and a half


def counters(daemon):
    text = requests.get(daemon.url + "/metrics", timeout=10).text
    values = {name: float(re.search(r"^vllm:%s\{[^}]*\} (\S+)$" % name, text, re.M)[1])
              for name in ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
                           "time_to_first_token_seconds_count")}
    for reason in ("stop", "length", "abort"):
        values[reason] = float(re.search(r'^vllm:request_success_total\{[^}]*finished_reason="%s"[^}]*\} (\S+)$' % reason, text, re.M)[1])
    return values


def growth(daemon, before, **wanted):
    """What the counters gained; those not named must have gained nothing. Asks again until it is what is wanted."""
    names = dict(prompt="prompt_tokens_total", generation="generation_tokens_total", queries="prefix_cache_queries_total",
                 hits="prefix_cache_hits_total", first="time_to_first_token_seconds_count", stop="stop", length="length", abort="abort")
    end = time.monotonic() + 10
    while True:
        now = counters(daemon)
        gained = {short: now[name] - before[name] for short, name in names.items() if now[name] != before[name]}
        if gained == wanted or time.monotonic() > end:
            return gained


def test_what_each_request_adds(start_fake):
    daemon = start_fake(FAKE_LAYER_US="1000")

    def ask(**more):
        body = {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True, "allowed_token_ids": [97]} | more
        answer = requests.post(daemon.url + "/v1/completions", json=body, timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]

    for more, wanted in [
        ({}, dict(prompt=40, generation=5, queries=40, first=1, length=1)),
        # The first answer's KV stands: the two full blocks of the prompt.
        ({}, dict(prompt=40, generation=5, queries=40, hits=32, first=1, length=1)),
        ({"n": 2, "max_tokens": 3}, dict(prompt=40, generation=6, queries=40, hits=32, first=1, length=1)),
        ({"stop_token_ids": [97]}, dict(prompt=40, generation=1, queries=40, hits=32, first=1, stop=1)),
        # Scores are computed, not looked up; and no token is none.
        ({"echo": True, "logprobs": 1, "max_tokens": 0}, dict(prompt=40, length=1)),
    ]:
        before = counters(daemon)
        usage = ask(**more)
        assert growth(daemon, before, **wanted) == wanted, more
        assert usage["prompt_tokens"] == 40 and usage["completion_tokens"] == wanted.get("generation", 0)
        assert usage["prompt_tokens_details"]["cached_tokens"] == wanted.get("hits", 0)

    before = counters(daemon)
    body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with requests.post(daemon.url + "/v1/completions", json=body, stream=True, timeout=20) as answer:
        next(answer.iter_lines())
    end = time.monotonic() + 10
    while counters(daemon)["abort"] == before["abort"] and time.monotonic() < end:
        time.sleep(0.02)
    now = counters(daemon)
    assert now["abort"] == before["abort"] + 1 and now["length"] == before["length"]
    assert 1 <= now["generation_tokens_total"] - before["generation_tokens_total"] < 900
