"""The HTTP door as clients meet it, over the fake engine: the official openai client and bare sockets."""

import http.client
import json
import os
import re
import socket
import subprocess
import threading
import time

import openai
import pytest
import requests
from conftest import FAKE, LOADING, MOED, READY, ROOT, Daemon, write_tiny_model

# The fake engine's tokens depend on the seed even at temperature 0: what is compared gives one.
MESSAGES = [{"role": "user", "content": "hello"}]
ASCII = list(range(97, 123))  # tokens a to z


@pytest.fixture
def client(fake):
    with openai.OpenAI(base_url=fake.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def metric(daemon, name):
    text = requests.get(daemon.url + "/metrics", timeout=10).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith((name + "{", name + " ")))


def eventually(holds, seconds=10):
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def idle(daemon):
    return metric(daemon, "vllm:num_requests_running") == 0 and metric(daemon, "vllm:num_requests_waiting") == 0


def test_chat_streamed_equals_plain(client):
    options = dict(model="tiny", messages=MESSAGES, max_tokens=40, temperature=0, seed=1, extra_body={"ignore_eos": True})
    plain = client.chat.completions.create(**options)
    assert plain.object == "chat.completion" and plain.model == "tiny"
    assert plain.choices[0].message.role == "assistant" and plain.choices[0].finish_reason == "length"
    assert plain.usage.completion_tokens == 40
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + 40

    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == plain.choices[0].message.content
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert all(c.usage is None for c in chunks[:-1])
    assert all(c.choices[0].delta.content for c in chunks[1:-2]), "no empty pieces"
    assert len(chunks) <= 40 + 3, "a token makes at most one piece of text; the role, the end and usage come besides"


def test_choices_of_a_stream(client):
    texts, finishes = {}, {}
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, max_tokens=10, seed=5, stream=True,
                                            extra_body={"ignore_eos": True, "allowed_token_ids": ASCII})
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        finishes[choice.index] = choice.finish_reason or finishes.get(choice.index)
    assert sorted(texts) == [0, 1, 2] and all(len(text) == 10 for text in texts.values())
    assert len(set(texts.values())) == 3, "each choice has a seed of its own"
    assert finishes == {0: "length", 1: "length", 2: "length"}


def test_completions_prompts_and_logprobs(client):
    answer = client.completions.create(model="tiny", prompt=["hello", "abc"], n=2, max_tokens=4, logprobs=2, seed=3,
                                       extra_body={"ignore_eos": True, "allowed_token_ids": ASCII})
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        scores = choice.logprobs
        assert "".join(scores.tokens) == choice.text
        assert scores.text_offset == [0, 1, 2, 3]
        for token, score, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs):
            assert top[token] == score
    by_ids = client.completions.create(model="tiny", prompt=[97, 98, 99], max_tokens=4, temperature=0, seed=1)
    by_text = client.completions.create(model="tiny", prompt="abc", max_tokens=4, temperature=0, seed=1)
    assert by_ids.choices[0].text == by_text.choices[0].text and by_ids.usage.prompt_tokens == 3


def test_echo_scores_the_prompt(client):
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == "abc" and choice.finish_reason == "length"
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert all(score <= 0 for score in choice.logprobs.token_logprobs[1:])
    longer = client.completions.create(model="tiny", prompt="abc", max_tokens=2, echo=True)
    assert longer.choices[0].text.startswith("abc")


def test_scores_of_a_prompt_do_not_come_from_the_prefix_cache(client):
    """A prompt that stands in the cache is computed again where its scores are wanted, and they are the same."""
    prompt = "scored, and long enough for several blocks of the cache: " + "y" * 80
    scored = dict(model="tiny", prompt=prompt, max_tokens=1, echo=True, logprobs=1)
    first = client.completions.create(**scored)
    assert client.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage.prompt_tokens_details.cached_tokens >= 128
    for answer in (client.completions.create(**scored), client.completions.create(
            model="tiny", prompt=prompt, max_tokens=1, extra_body={"prompt_logprobs": 1})):
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
    again = client.completions.create(**scored).choices[0].logprobs
    assert again.token_logprobs[1:-1] == first.choices[0].logprobs.token_logprobs[1:-1]
    assert all(score is not None for score in again.token_logprobs[1:])


def test_chat_logprobs(client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=2,
                                            extra_body={"ignore_eos": True, "allowed_token_ids": ASCII})
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    assert bytes(b for entry in content for b in entry.bytes).decode() == answer.choices[0].message.content


def test_stop_strings_split_anywhere(client):
    """Whatever the answer is: cutting it at any of its substrings gives what comes before the first one."""
    options = dict(model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, seed=1, extra_body={"allowed_token_ids": ASCII})
    whole = client.chat.completions.create(**options).choices[0].message.content
    for begin in range(0, 20, 3):
        stop = whole[begin:begin + 4]
        cut = whole[:whole.index(stop)]
        plain = client.chat.completions.create(**options, stop=[stop, "0"])
        assert plain.choices[0].message.content == cut and plain.choices[0].finish_reason == "stop"
        chunks = list(client.chat.completions.create(**options, stop=stop, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == cut


def test_models(client, fake):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny"] and listed[0].max_model_len == 1024
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


@pytest.mark.parametrize("field, value", [
    ("temperature", -1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.5), ("n", 0), ("n", 100000), ("max_tokens", 0),
    ("presence_penalty", 3), ("frequency_penalty", -3), ("logit_bias", {"99999": 1}), ("logit_bias", {"a": 1}),
    ("top_k", -5), ("min_p", 2), ("repetition_penalty", 0), ("stop", [""]), ("stop", ["x"] * 100),
    ("stop_token_ids", [-1]), ("allowed_token_ids", []), ("tools", [{"type": "function"}]),
    ("response_format", {"type": "json_object"}), ("chat_template", "x"), ("messages", []), ("messages", "hi"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("stream", "yes"), ("seed", 1.5),
])
def test_bad_fields_are_named(fake, field, value):
    answer = requests.post(fake.url + "/v1/chat/completions", json={"messages": MESSAGES, field: value}, timeout=10)
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["param"].startswith(field) and field in error["message"] and isinstance(error["code"], str)


def test_error_classes(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert caught.value.code == "model_not_found" and "tiny" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 1024 tokens" in caught.value.message
    assert "xxx" not in caught.value.message


def test_keys(start_fake, tmp_path, moed_pb):
    file = tmp_path / "keys"
    file.write_text("first\nsecond\n")
    daemon = start_fake("--api-key-file", str(file))
    for key, allowed in [("first", True), ("second", True), ("third", False)]:
        client = openai.OpenAI(base_url=daemon.url + "/v1", api_key=key, max_retries=0)
        if allowed:
            assert client.models.list().data
        else:
            with pytest.raises(openai.AuthenticationError):
                client.chat.completions.create(model="tiny", messages=MESSAGES)
    for path in ("/live", "/health", "/ready"):
        assert requests.get(daemon.url + path, timeout=10).status_code == 200
    assert requests.get(daemon.url + "/metrics", timeout=10).status_code == 401


def test_a_client_that_leaves_frees_its_place(start_fake):
    daemon = start_fake(FAKE_LAYER_US="5000")
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", daemon.http_port)
        body = {"messages": MESSAGES, "max_tokens": 900, "stream": stream, "ignore_eos": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        assert eventually(lambda: metric(daemon, "vllm:num_requests_running") == 1)
        connection.close()
        assert eventually(lambda: idle(daemon)), f"stream={stream}"


def test_many_at_once_answer_as_alone(fake):
    client = openai.OpenAI(base_url=fake.url + "/v1", api_key="none", max_retries=0)
    prompts = [f"prompt {i} " * (i + 1) for i in range(16)]

    def ask(prompt):
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0, seed=1).choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    together = [None] * len(prompts)

    def run(i):
        together[i] = ask(prompts[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_layer_that_hangs_turns_live_red(start_fake):
    daemon = start_fake("--layer-seconds", "1", FAKE_LAYERS="1", FAKE_LAYER_US="2500000")
    live = lambda: requests.get(daemon.url + "/live", timeout=10).status_code
    for _ in range(15):  # longer than that, nothing is asked
        assert live() == 200
        time.sleep(0.1)
    body = {"messages": MESSAGES, "max_tokens": 1, "stream": True}
    with requests.post(daemon.url + "/v1/chat/completions", json=body, stream=True, timeout=30) as answer:
        assert eventually(lambda: live() == 503)
        assert b"[DONE]" in answer.content
    assert eventually(lambda: live() == 200)


def test_full_queue_is_429(start_fake):
    daemon = start_fake("--sequences-max", "1", "--queue-max", "1", FAKE_LAYER_US="20000")
    body = {"messages": MESSAGES, "max_tokens": 200, "ignore_eos": True, "stream": True}
    held = [requests.post(daemon.url + "/v1/chat/completions", json=body, stream=True, timeout=30) for _ in range(2)]
    assert [answer.status_code for answer in held] == [200, 200]
    refused = requests.post(daemon.url + "/v1/chat/completions", json=body, timeout=10)
    assert refused.status_code == 429 and refused.headers["Retry-After"] and refused.json()["error"]["code"]
    for answer in held:
        answer.close()
    assert eventually(lambda: idle(daemon))
    assert requests.post(daemon.url + "/v1/chat/completions", json=body | {"max_tokens": 1}, timeout=30).status_code == 200


def test_bad_http_and_the_daemon_goes_on(fake):
    def raw(request):
        with socket.create_connection(("127.0.0.1", fake.http_port), timeout=10) as connection:
            connection.sendall(request)
            return connection.recv(65536).split(b"\r\n")[0]

    assert b" 400 " in raw(b"nonsense\r\n\r\n")
    assert b" 404 " in raw(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 405 " in raw(b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 415 " in raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}")
    assert b" 413 " in raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 99999999999\r\n\r\n")
    assert b" 431 " in raw(b"GET /live HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 60000 + b"\r\n\r\n")
    for body in ("{", "[]", "null", '{"messages": [{"role": "user", "content": "\xff"}]}', "[" * 100000, '{"temperature": NaN}'):
        answer = requests.post(fake.url + "/v1/chat/completions", data=body.encode("latin-1"), timeout=10,
                               headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, body[:40]
    assert requests.get(fake.url + "/live", timeout=10).status_code == 200


def test_routes_for_probes_and_people(fake):
    info = requests.get(fake.url + "/info", timeout=10).json()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info["version"]) and info["model"]["names"] == ["tiny"]
    assert info["model"]["max_model_len"] == 1024 and info["memory_budget"]["kv_blocks"] == 4096
    assert info["plan"]["policy"] and info["device"] == "fake" and info["settings"]["limits"]["n_max"] == 64
    assert requests.get(fake.url + "/ready", timeout=10).json()["status"] == "ready"
    for name in ("vllm:num_requests_running", "vllm:prompt_tokens_total", "vllm:time_to_first_token_seconds_bucket"):
        assert name in requests.get(fake.url + "/metrics", timeout=10).text


def test_info_holds_the_limits(start_fake):
    """Each setting that docs/API.md names as a limit, with the value in force."""
    document = (ROOT / "docs/API.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:limits|scheduler)\.\w+)`", document.split("## Limits")[1].split("\n## ")[0])
    daemon = start_fake("--n-max", "7", "--stop-max", "9")
    settings = requests.get(daemon.url + "/info", timeout=10).json()["settings"]
    for name in names:
        section, key = name.split(".")
        assert isinstance(settings[section][key], (int, float)), name
    assert settings["limits"]["n_max"] == 7 and settings["limits"]["stop_max"] == 9
    assert {f"limits.{key}" for key in settings["limits"]} <= set(names), "a limit that the document lacks"


def test_settings_of_time_reach_the_http_door(start_fake):
    daemon = start_fake("--idle-seconds", "0.4", "--ping-seconds", "0.2", "--write-seconds", "0.5", FAKE_LAYER_US="300000")
    with socket.create_connection(("127.0.0.1", daemon.http_port), timeout=10) as idle:
        begin = time.monotonic()
        assert idle.recv(100) == b"" and 0.3 < time.monotonic() - begin < 5
    body = {"prompt": "abc", "max_tokens": 1, "ignore_eos": True, "stream": True}
    lines = list(requests.post(daemon.url + "/v1/completions", json=body, stream=True, timeout=20).iter_lines())
    assert 1 <= lines.count(b": ping") <= 5 and lines.index(b": ping") < lines.index(b"data: [DONE]")


def test_a_reader_that_takes_nothing_is_dropped_in_time(start_fake):
    daemon = start_fake("--write-seconds", "0.5", FAKE_LAYER_US="100")
    body = json.dumps({"prompt": "abc", "max_tokens": 700, "n": 64, "logprobs": 20, "ignore_eos": True, "stream": True})
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", daemon.http_port))
        stalled.sendall((f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                         f"Content-Length: {len(body)}\r\n\r\n{body}").encode())
        daemon.wait_log(r"status=200 total_ms=\d+ outcome=cut stream=true", 20)
        assert eventually(lambda: idle(daemon))


@pytest.mark.parametrize("flags, small, large", [
    ([], 1, 100), (["--template-fuel", "1000"], 1, 100), (["--template-output-bytes", "1024"], 50, 80)])
def test_settings_of_the_template_reach_it(start_fake, flags, small, large):
    """Chats of so many messages of one word, 14 bytes and more each: the large one is too much for a small setting."""
    daemon = start_fake(*flags)
    for count in (small, large):
        body = {"messages": [{"role": "user", "content": "hello"}] * count, "max_tokens": 1, "truncate_prompt_tokens": 100}
        answer = requests.post(daemon.url + "/v1/chat/completions", json=body, timeout=10)
        refused = flags != [] and count == large
        assert answer.status_code == (400 if refused else 200), (count, answer.text)
        assert not refused or "template" in answer.json()["error"]["message"], answer.text


def test_queued_tokens_are_limited(start_fake):
    daemon = start_fake("--sequences-max", "1", "--queue-tokens-max", "10", FAKE_LAYER_US="20000")
    body = {"prompt": "abcdef", "max_tokens": 200, "ignore_eos": True, "stream": True}
    held = [requests.post(daemon.url + "/v1/completions", json=body, stream=True, timeout=30) for _ in range(2)]
    refused = requests.post(daemon.url + "/v1/completions", json=body, timeout=10)
    assert refused.status_code == 429 and "queue_tokens_max" in refused.text and refused.headers["Retry-After"] == "1"
    for answer in held:
        answer.close()


def test_loading_is_told(start_fake):
    """The ports are open before the model is there."""
    daemon = start_fake(said=LOADING, FAKE_LOAD_MS="2000")
    assert "ready:" not in daemon.log
    assert eventually(lambda: requests.get(daemon.url + "/ready", timeout=10).json().get("loaded_bytes") == 400)
    ready = requests.get(daemon.url + "/ready", timeout=10)
    assert ready.status_code == 503 and ready.json()["status"] == "loading" and ready.json()["total_bytes"] == 1000
    assert requests.get(daemon.url + "/health", timeout=10).status_code == 503
    assert requests.get(daemon.url + "/live", timeout=10).status_code == 200
    body = {"messages": MESSAGES, "max_tokens": 2}
    assert requests.post(daemon.url + "/v1/chat/completions", json=body, timeout=10).status_code == 503
    assert "ready:" not in daemon.log, "the above came while it loaded"
    daemon.wait_log(READY)
    assert requests.get(daemon.url + "/health", timeout=10).status_code == 200
    assert requests.get(daemon.url + "/ready", timeout=10).status_code == 200
    assert requests.post(daemon.url + "/v1/chat/completions", json=body, timeout=10).status_code == 200


def health_command(*flags, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOED_")}
    done = subprocess.run([str(MOED), "health", *flags], env=clean | environment, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stderr


def test_health_command(fake, tmp_path):
    port = str(fake.http_port)
    config = tmp_path / "moed.toml"
    config.write_text(f'[server]\nhost = "0.0.0.0"\nhttp_port = {port}\n')
    assert health_command("--http-port", port) == (0, "")
    assert health_command("--port", port) == (0, "")
    assert health_command("--config", str(config)) == (0, "")
    assert health_command(MOED_CONFIG=str(config)) == (0, "")
    assert health_command(MOED_HTTP_PORT=port) == (0, "")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        status, message = health_command("--config", str(config), "--http-port", str(closed.getsockname()[1]))
    assert status == 1 and "does not answer" in message
    assert health_command("--nonsense", "1")[0] == 2


def test_large_chats_do_not_switch_chat_off(fake):
    """A template that runs out of memory a few times is no longer run: no request may bring that about."""
    objects = "[{}" + ",{}" * 4_000_000 + "]"
    small = json.dumps(MESSAGES)
    bodies = ['{"messages": %s, "chat_template_kwargs": {"x": %s}}' % (small, objects),
              '{"messages": [{"role": "user", "content": "hi", "x": %s}]}' % objects]
    for path in ("/v1/chat/completions", "/tokenize"):
        for body in bodies * 3:
            answer = requests.post(fake.url + path, data=body, timeout=60, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded", answer.text
    answer = requests.post(fake.url + "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 2}, timeout=10)
    assert answer.status_code == 200, answer.text


def test_role_comes_while_text_is_held(start_fake):
    """Text that may begin a stop string waits, the chunk with the role does not."""
    daemon = start_fake(FAKE_LAYER_US="20000")
    body = {"messages": MESSAGES, "max_tokens": 40, "ignore_eos": True, "allowed_token_ids": [97], "stop": "a" * 30 + "b",
            "stream": True}
    start = time.monotonic()
    chunks, times = [], []
    with requests.post(daemon.url + "/v1/chat/completions", json=body, stream=True, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                chunks.append(json.loads(line[6:]))
                times.append(time.monotonic() - start)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[1]["content"]
    assert all(delta["content"] for delta in deltas[1:-1]), "no empty pieces"
    assert "".join(delta.get("content", "") for delta in deltas) == "a" * 40
    assert times[0] < times[1] / 2, times[:2]


def test_dummy_weights_serve(tiny_model):
    """A folder without weights: the real daemon makes some."""
    daemon = Daemon(MOED, tiny_model, "--load-format", "dummy", "--kv-gib", "0.1")
    try:
        body = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answers = [requests.post(daemon.url + "/v1/completions", json=body, timeout=60) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
        assert answers[0].json()["usage"] == answers[1].json()["usage"]
        assert answers[0].json()["usage"]["completion_tokens"] == 4
        assert answers[0].json()["choices"][0]["text"] == answers[1].json()["choices"][0]["text"]
    finally:
        assert daemon.stop() == 0, daemon.log


def test_tokenize_and_back(fake):
    answer = requests.post(fake.url + "/tokenize", json={"prompt": "hello abc"}, timeout=10).json()
    assert answer["tokens"] == [260, 32, 97, 98, 99] and answer["count"] == 5 and answer["max_model_len"] == 1024
    back = requests.post(fake.url + "/detokenize", json={"tokens": answer["tokens"]}, timeout=10).json()
    assert back["prompt"] == "hello abc"
    for token in (-1, 261, 2**40):
        refused = requests.post(fake.url + "/detokenize", json={"tokens": [97, token]}, timeout=10)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tokens", refused.text


def test_drain_lets_streams_end(start_fake):
    daemon = start_fake("--drain-seconds", "20", FAKE_LAYER_US="5000")
    client = openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="tiny", prompt="abc", max_tokens=60, stream=True, extra_body={"ignore_eos": True})
    chunks = [next(iter(stream))]
    daemon.process.terminate()
    daemon.wait_log("draining")
    assert requests.get(daemon.url + "/ready", timeout=10).status_code == 503
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="abc")
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert daemon.process.wait(30) == 0


@pytest.mark.parametrize("config, tokenizer, generation, ends", [
    (256, {}, {}, [256]), (None, {"eos_token": "<eos>"}, {}, [256]), (None, {"eos_token": {"content": "<eos>"}}, {}, [256]),
    (256, {"eos_token": "<eos>"}, {"eos_token_id": [97, 98]}, [97, 98, 256]), ([256, 99], {}, {"eos_token_id": 97}, [97]),
])
def test_where_an_answer_ends(start_fake, tmp_path, config, tokenizer, generation, ends):
    """EOS of generation_config.json, else of config.json; and the tokenizer's."""
    folder = write_tiny_model(tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"eos_token_id": config}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    daemon = start_fake(model=folder)
    for token in (97, 98, 99, 256):
        body = {"prompt": "hello", "max_tokens": 3, "allowed_token_ids": [token]}
        answer = requests.post(daemon.url + "/v1/completions", json=body, timeout=10).json()
        assert answer["choices"][0]["finish_reason"] == ("stop" if token in ends else "length"), (token, ends)
        assert answer["usage"]["completion_tokens"] == (1 if token in ends else 3)
        assert answer["choices"][0]["text"] == ("" if token in ends + [256] else chr(token) * 3)


def test_several_names(start_fake):
    daemon = start_fake("--served-model-name", "org/first", "--served-model-name", "second")
    client = openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["org/first", "second"]
    assert client.models.retrieve("org/first").id == "org/first"
    for name in ("org/first", "second"):
        assert client.completions.create(model=name, prompt="a", max_tokens=1).model == name
    answer = requests.post(daemon.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=10)
    assert answer.json()["model"] == "org/first"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="tiny", prompt="a")


def test_more_connections_than_the_shell_allows(tiny_model, tmp_path):
    """The usual limit of open files is below connections_max: the daemon raises it as far as it may."""
    wrapper = tmp_path / "limited"
    wrapper.write_text(f'#!/bin/sh\nulimit -S -n 256\nexec {FAKE} "$@"\n')
    wrapper.chmod(0o755)
    daemon = Daemon(wrapper, tiny_model)
    try:
        held = [socket.create_connection(("127.0.0.1", daemon.http_port), timeout=10) for _ in range(600)]
        assert requests.get(daemon.url + "/live", timeout=10).status_code == 200
        for connection in held:
            connection.close()
    finally:
        assert daemon.stop() == 0, daemon.log


def test_given_up_requests_are_counted_by_phase(start_fake):
    """One sequence at a time; a pass takes 0.2 s a layer."""
    daemon = start_fake("--sequences-max", "1", FAKE_LAYER_US="200000")

    def counts():
        text = requests.get(daemon.url + "/metrics", timeout=10).text
        return {phase: float(re.search(r'moed:requests_cancelled_total\{[^}]*phase="%s"[^}]*\} (\S+)' % phase, text)[1])
                for phase in ("waiting", "prefill", "decode")}

    def begin():
        connection = http.client.HTTPConnection("127.0.0.1", daemon.http_port, timeout=30)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "abc", "max_tokens": 50, "ignore_eos": True, "stream": True}),
                           {"Content-Type": "application/json"})
        return connection, connection.getresponse()  # the head: it is queued

    assert counts() == {"waiting": 0, "prefill": 0, "decode": 0}
    first, answer = begin()
    answer.readline()
    second, _held = begin()
    second.close()
    _held.close()
    assert eventually(lambda: counts() == {"waiting": 1, "prefill": 0, "decode": 0}), counts()
    first.close()
    answer.close()
    assert eventually(lambda: counts()["decode"] == 1 and idle(daemon)), counts()
    third, head = begin()
    time.sleep(0.1)  # in the first of the pass's two layers
    third.close()
    head.close()
    assert eventually(lambda: counts() == {"waiting": 1, "prefill": 1, "decode": 1}), counts()
