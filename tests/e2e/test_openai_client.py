"""The official openai client, unmodified: its exception classes, its async form, its headers, and vLLM's extras through extra_body."""

import asyncio
import json
import re
import threading
import time

import openai
import pytest
import requests
from conftest import MOED, Daemon

MESSAGES = [{"role": "user", "content": "hello"}]
ASCII = list(range(97, 123))  # tokens a to z


def client_of(daemon, **options):
    return openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0, **options)


@pytest.fixture
def client(fake):
    with client_of(fake) as made:
        yield made


@pytest.fixture(scope="module")
def dummy(tiny_model):
    """The real daemon over random weights."""
    daemon = Daemon(MOED, tiny_model, "--load-format", "dummy", "--kv-gib", "0.1")
    yield daemon
    assert daemon.stop() == 0, daemon.log


def running(daemon):
    text = requests.get(daemon.url + "/metrics", timeout=10).text
    return sum(float(value) for value in re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)", text, re.M))


def wait_for(holds, seconds=10):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("options", [
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, {"tool_choice": "auto"},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    {"extra_body": {"structured_outputs": {"regex": "a"}}}, {"extra_body": {"guided_choice": ["a"]}},
    {"extra_body": {"use_beam_search": True}}, {"extra_body": {"chat_template": "x"}},
])
def test_what_is_not_supported_yet_says_so(client, options):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, **options)
    field = next(iter(options.get("extra_body", options)))
    assert caught.value.param == field and "not supported" in caught.value.message
    assert caught.value.code == "unsupported_parameter" and caught.value.type == "invalid_request_error"


def test_accepted_as_nothing(client):
    """What many clients send with every request."""
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2, tool_choice="none", stop=[],
                                            response_format={"type": "text"}, user="u", parallel_tool_calls=True,
                                            store=False, metadata={"a": "b"}, extra_body={"tools": [], "logprobs": None})
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.refusal is None


def test_exception_classes_of_limits(start_fake, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    daemon = start_fake("--sequences-max", "1", "--queue-max", "1", "--body-bytes-max", "2000", "--api-key-file", str(keys),
                        FAKE_LAYER_US="20000")
    client = client_of(daemon).with_options(api_key="secret")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt="x" * 3000)
    assert caught.value.status_code == 413 and "2000 bytes (body_bytes_max)" in caught.value.message
    long = dict(model="tiny", prompt="abc", max_tokens=200, stream=True, extra_body={"ignore_eos": True})
    held = [client.completions.create(**long)]
    next(held[0])  # it runs, and so the queue has room for the second
    held.append(client.completions.create(**long))
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(**long)
    assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "queue_full"
    # The client's own retries get through once there is room.
    threading.Timer(0.3, lambda: [stream.close() for stream in held]).start()
    assert client.with_options(max_retries=5).completions.create(model="tiny", prompt="abc", max_tokens=1).choices
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**long | {"stream": False})
    assert daemon.stop() == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_stream_that_fails_midway_raises(start_fake):
    daemon = start_fake("--request-seconds", "0.5", FAKE_LAYER_US="10000")
    stream = client_of(daemon).chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=900, stream=True,
                                                       extra_body={"ignore_eos": True})
    chunks = []
    with pytest.raises(openai.APIError, match="limits.request_seconds"):
        for chunk in stream:
            chunks.append(chunk)
    assert len(chunks) > 2 and chunks[-1].choices[0].finish_reason is None


def test_async_clients_that_give_up(start_fake):
    daemon = start_fake(FAKE_LAYER_US="5000")

    async def give_up(stream):
        async with openai.AsyncOpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0) as client:
            async def ask():
                answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=900, stream=stream,
                                                              extra_body={"ignore_eos": True})
                async for _ in answer:
                    pass

            tasks = [asyncio.create_task(ask()) for _ in range(8)]
            while await asyncio.to_thread(running, daemon) < 8:
                await asyncio.sleep(0.02)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while await asyncio.to_thread(running, daemon) > 0:
                await asyncio.sleep(0.02)

    for stream in (True, False):
        asyncio.run(asyncio.wait_for(give_up(stream), 20))


def test_logprobs_of_a_stream_are_those_of_the_plain_answer(client):
    options = dict(model="tiny", max_tokens=12, temperature=0, seed=4, extra_body={"ignore_eos": True, "allowed_token_ids": ASCII})
    plain = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **options).choices[0]
    chunks = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True, **options)
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == plain.logprobs.content and len(streamed) == 12
    for entry in streamed:
        assert [other.logprob for other in entry.top_logprobs if other.token == entry.token] == [entry.logprob]
        assert len(entry.top_logprobs) == 3
    plain = client.completions.create(prompt="abc", logprobs=2, echo=True, **options).choices[0].logprobs
    chunks = list(client.completions.create(prompt="abc", logprobs=2, echo=True, stream=True, **options))
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [item for chunk in chunks for item in getattr(chunk.choices[0].logprobs, field)]
        assert joined == getattr(plain, field), field
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=MESSAGES, top_logprobs=3, **options)
    assert caught.value.param == "top_logprobs"


def test_usage_of_a_stream_as_it_goes(client):
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=6, stream=True, extra_body={"ignore_eos": True},
                                            stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 6


def test_cached_tokens_are_told(client):
    prompt = "a prompt of its own, and long enough for several blocks of the cache: " + "x" * 80
    options = dict(model="tiny", prompt=prompt, max_tokens=1)
    assert client.completions.create(**options).usage.prompt_tokens_details.cached_tokens == 0
    assert client.completions.create(**options).usage.prompt_tokens_details.cached_tokens >= 128


def test_token_ids_come_back(client, fake):
    options = dict(model="tiny", max_tokens=20, temperature=0, seed=2, extra_body={"return_token_ids": True, "allowed_token_ids": ASCII})
    answer = client.chat.completions.create(messages=MESSAGES, **options)
    asked = requests.post(fake.url + "/tokenize", json={"messages": MESSAGES}, timeout=10).json()["tokens"]
    assert answer.model_extra["prompt_token_ids"] == asked
    ids = answer.choices[0].model_extra["token_ids"]
    assert "".join(map(chr, ids)) == answer.choices[0].message.content and len(ids) == answer.usage.completion_tokens
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **options))
    assert chunks[0].model_extra["prompt_token_ids"] == asked
    assert [token for chunk in chunks for token in chunk.choices[0].model_extra.get("token_ids", [])] == ids
    # A stop string cuts the text, not the ids.
    text = answer.choices[0].message.content
    cut = client.chat.completions.create(messages=MESSAGES, stop=text[5:8], **options).choices[0]
    assert cut.message.content == text[:5] and cut.model_extra["token_ids"] == ids[:8]
    completion = client.completions.create(prompt="abc", n=2, **options)
    assert [choice.model_extra["prompt_token_ids"] for choice in completion.choices] == [[97, 98, 99]] * 2
    for choice in completion.choices:
        assert "".join(map(chr, choice.model_extra["token_ids"])) == choice.text


def test_bad_words_do_not_come(dummy):
    """On a real engine: each answer's own words are forbidden one after another."""
    client = client_of(dummy)
    extra = {"allowed_token_ids": ASCII, "ignore_eos": True}
    options = dict(model="tiny", prompt="hello", max_tokens=24, temperature=0)
    banned, seen = [], set()
    for _ in range(6):
        text = client.completions.create(**options, extra_body=extra | {"bad_words": banned}).choices[0].text
        assert len(text) == 24 and text not in seen and not any(word in text for word in banned), (banned, text)
        seen.add(text)
        banned.append(text[len(banned):len(banned) + 2])


def test_stop_strings_end_at_every_position(dummy):
    """Every substring of an answer as its stop string: the text before its first occurrence, streamed and not."""
    client = client_of(dummy)
    options = dict(model="tiny", prompt="abc", max_tokens=10, seed=11, temperature=1.5,
                   extra_body={"allowed_token_ids": ASCII, "ignore_eos": True})
    whole = client.completions.create(**options).choices[0].text
    assert len(whole) == 10
    for begin in range(10):
        for end in range(begin + 1, 11):
            stop = whole[begin:end]
            stream = (begin + end) % 2 == 0
            answer = client.completions.create(**options, stop=["0", stop], stream=stream)
            choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
            assert "".join(choice.text for choice in choices) == whole[:whole.index(stop)], stop
            assert choices[-1].finish_reason == "stop" and choices[-1].model_extra["stop_reason"] == stop


def test_request_ids_go_through(fake):
    with client_of(fake, default_headers={"X-Request-Id": "my.id-1"}) as client:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
        assert answer._request_id == "my.id-1"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=7)
        assert caught.value.request_id == "my.id-1"
    fake.wait_log(r"request id=my\.id-1 method=POST path=/v1/chat/completions status=200 total_ms=\d+ outcome=done "
                  r"stream=false prompt_tokens=\d+ .*completion_tokens=2 ttft_ms=\d+")
    with client_of(fake, default_headers={"X-Request-Id": "no spaces"}) as client:
        replaced = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)._request_id
        assert re.fullmatch(r"[0-9a-f]{32}", replaced)


def test_one_line_a_request_and_none_with_its_text(start_fake):
    daemon = start_fake("--log-level", "debug", "--log-json")
    secret = "words that nobody else sends"
    ids = []
    for i, more in enumerate([{}, {"stream": True}, {"temperature": 9}, {"n": "x"}, {"model": "other"}, {"max_tokens": 5000}, {"zzz": secret}]):
        ids.append(f"line-{i}")
        requests.post(daemon.url + "/v1/completions", json={"prompt": secret, "max_tokens": 2, "user": secret} | more, timeout=10,
                      headers={"X-Request-Id": ids[-1]})
    daemon.stop()
    assert daemon.log.count("request id=") == len(ids)
    lines = [json.loads(line) for line in daemon.log.splitlines() if line.startswith("{")]
    told = [line["message"] if "message" in line else json.dumps(line) for line in lines if line.get("level") == "info"]
    for name in ids:
        assert sum(f"id={name} " in text for text in told) == 1, (name, told)
    assert secret not in daemon.log and sum("zzz" in text for text in told) == 1
