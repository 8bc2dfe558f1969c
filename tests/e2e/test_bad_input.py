"""Hostile clients: each is refused with words that name the field or limit, the daemon goes on, and no KV block leaks."""

import concurrent.futures
import json
import re
import resource
import socket
import time

import grpc
import pytest
import requests

MESSAGES = [{"role": "user", "content": "hello"}]
SECRET = "my own secret words"
JSON = {"Content-Type": "application/json"}


def metrics(daemon):
    text = requests.get(daemon.url + "/metrics", timeout=10).text
    found = re.findall(r"^(vllm:(?:num_requests_running|num_requests_waiting|kv_cache_usage_perc))\{[^}]*\} (\S+)", text, re.M)
    return {name: float(value) for name, value in found}


def assert_unharmed(daemon, seconds=15):
    """Nothing runs, nothing waits, no block is in use; and it answers."""
    end = time.monotonic() + seconds
    while any(state := metrics(daemon).values()):
        assert time.monotonic() < end, state
        time.sleep(0.05)
    answer = requests.post(daemon.url + "/v1/completions", json={"prompt": "abc", "max_tokens": 2, "ignore_eos": True}, timeout=30)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2, answer.text


def with_prompt(fields):
    return '{"prompt": "%s", "messages": [{"role": "user", "content": "%s"}], "tokens": [1], %s}' % (SECRET, SECRET, fields)


GENERATE = ["/v1/chat/completions", "/v1/completions"]
ROUTES = GENERATE + ["/tokenize", "/detokenize"]
BAD_JSON = {
    "empty": b"",
    "cut": with_prompt('"n":').encode(),
    "array": b"[1]",
    "null": b"null",
    "two objects": b"{}{}",
    "trailing": with_prompt('"n": 1').encode() + b"x",
    "NaN": with_prompt('"temperature": NaN').encode(),
    "infinity": with_prompt('"temperature": 1e999').encode(),
    "deep": with_prompt('"x": ' + "[" * 200 + "]" * 200).encode(),
    "very deep": b"[" * 1_000_000,
    "not UTF-8": with_prompt('"user": "').encode()[:-1] + b'\xff\xfe"}',
    "half a surrogate": with_prompt(r'"user": "\ud800"').encode(),
    "zero byte": with_prompt('"n": 1').encode() + b"\0",
    "many members": b'{"logit_bias": {' + b",".join(b'"%d": 1' % i for i in range(200_000)) + b"}}",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bodies_that_are_no_request(fake, name):
    for route in ROUTES:
        answer = requests.post(fake.url + route, data=BAD_JSON[name], headers=JSON, timeout=30)
        error = answer.json()["error"]
        assert answer.status_code == 400, (route, answer.text)
        assert isinstance(error["message"], str) and isinstance(error["type"], str) and isinstance(error["code"], str)
        assert SECRET not in answer.text
    assert_unharmed(fake)


@pytest.mark.parametrize("field, value", [
    ("temperature", 1e308), ("temperature", -0.0001), ("temperature", []), ("top_p", -1), ("n", 2**62), ("n", -1), ("n", 1.5),
    ("max_tokens", 2**62), ("max_tokens", -5), ("min_tokens", 2**40), ("seed", 2**80), ("seed", "x"), ("priority", 2**40),
    ("stop", {"a": 1}), ("stop", [1]), ("stop", ["x" * 5000]), ("bad_words", [""]), ("bad_words", ["x"] * 1000),
    ("stop_token_ids", list(range(1000))), ("logit_bias", {"1": 1000}), ("logit_bias", {str(i): 1 for i in range(2000)}),
    ("repetition_penalty", 1e30), ("truncate_prompt_tokens", -7), ("prompt_logprobs", 1000), ("allowed_token_ids", [10**9]),
    ("stream", {}), ("stream_options", []), ("response_format", 5), ("logprobs", "x"), ("model", 7), ("return_token_ids", "yes"),
])
def test_fields_out_of_range(fake, field, value):
    """Both completions doors say which field it is."""
    for route in GENERATE:
        body = {"prompt": SECRET, "messages": [{"role": "user", "content": SECRET}], field: value}
        answer = requests.post(fake.url + route, json=body, timeout=30)
        error = answer.json()["error"]
        assert answer.status_code == 400, (route, answer.text)
        assert error["param"].startswith(field) and field in error["message"], error
        assert SECRET not in answer.text and SECRET not in fake.log
    assert_unharmed(fake)


def test_prompts_over_the_context(fake):
    bodies = [("/v1/completions", {"prompt": SECRET * 1000}), ("/v1/completions", {"prompt": list(range(200)) * 6}),
              ("/v1/completions", {"prompt": "x" * 20_000_000}),
              ("/v1/completions", {"prompt": "abc", "max_tokens": 1022}),
              ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET * 1000}]}),
              ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}] * 5000})]
    for route, body in bodies:
        error = requests.post(fake.url + route, json=body, timeout=60).json()["error"]
        assert error["code"] == "context_length_exceeded", error
        assert error["message"].startswith("This model's maximum context length is 1024 tokens")
    assert SECRET not in fake.log
    assert_unharmed(fake)


def test_unknown_models_and_known_ones(fake):
    for route in ROUTES:
        body = {"prompt": "a", "messages": MESSAGES, "tokens": [1]}
        assert requests.post(fake.url + route, json=body | {"model": "tiny"}, timeout=10).status_code == 200
        answer = requests.post(fake.url + route, json=body | {"model": "../../etc/passwd"}, timeout=10)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        assert "tiny" in answer.json()["error"]["message"]
    assert_unharmed(fake)


def send_endless(daemon, head, piece, count):
    """Sends until the daemon has had enough; what it answered."""
    with socket.create_connection(("127.0.0.1", daemon.http_port), timeout=60) as connection:
        try:
            connection.sendall(head)
            for _ in range(count):
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return connection.recv(65536)


def rss_mib(daemon):
    with open(f"/proc/{daemon.process.pid}/status", encoding="ascii") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024


def test_bodies_of_a_hundred_megabytes(fake, moed_pb):
    before = rss_mib(fake)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = send_endless(fake, head + b"Content-Length: 104857600\r\n\r\n", b" " * (1 << 20), 100)
    assert b" 413 " in answer.split(b"\r\n")[0] and b"33554432 bytes (body_bytes_max)" in answer
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    answer = send_endless(fake, head + b"Transfer-Encoding: chunked\r\n\r\n", chunk, 100)
    assert b" 413 " in answer.split(b"\r\n")[0]
    pb, services = moed_pb
    with grpc.insecure_channel(fake.grpc_target, options=[("grpc.max_send_message_length", -1)]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            services.InferenceStub(channel).Tokenize(pb.TokenizeRequest(text="x" * 104_857_600), timeout=60)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_unharmed(fake)
    assert rss_mib(fake) < before + 200


def test_bodies_that_come_at_once_are_bounded(start_fake):
    """Sixteen clients that stop one byte before the end of 8 MB each: no more is held than limits.reading_bytes_max."""
    daemon = start_fake("--reading-bytes-max", str(32 << 20))
    before = rss_mib(daemon)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 8000000\r\n\r\n"
    connections = []
    for _ in range(16):
        connections.append(socket.create_connection(("127.0.0.1", daemon.http_port), timeout=20))
        connections[-1].sendall(head + b" " * 7_999_999)
    refused = 0
    for connection in connections:
        connection.settimeout(1)
        try:
            answer = connection.recv(65536)
            assert b" 429 " in answer and b"limits.reading_bytes_max" in answer and b"Retry-After" in answer
            refused += 1
        except TimeoutError:
            pass
        if refused == 12:
            break
    assert refused >= 12
    assert rss_mib(daemon) < before + 96
    for connection in connections:
        connection.close()
    assert_unharmed(daemon)


def test_thousands_of_idle_connections(fake):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, min(hard, 8192))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    idle = [socket.create_connection(("127.0.0.1", fake.http_port), timeout=20) for _ in range(min(3000, most - 500))]
    try:
        begin = time.monotonic()
        assert_unharmed(fake)
        assert time.monotonic() - begin < 5
    finally:
        for connection in idle:
            connection.close()
    assert_unharmed(fake)


def test_connections_beyond_the_limit(start_fake):
    daemon = start_fake("--connections-max", "20")
    idle = [socket.create_connection(("127.0.0.1", daemon.http_port), timeout=20) for _ in range(20)]
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", daemon.http_port), timeout=20) as extra:
        answer = extra.recv(65536)
        assert b" 503 " in answer.split(b"\r\n")[0] and b"connections_max" in answer
    for connection in idle:
        connection.close()
    time.sleep(0.2)
    assert_unharmed(daemon)


def test_slow_senders(start_fake):
    """Heads and bodies that come a byte at a time end at their time limits; others do not notice."""
    daemon = start_fake("--header-seconds", "1", "--body-seconds", "1")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    slow = [socket.create_connection(("127.0.0.1", daemon.http_port), timeout=20) for _ in range(300)]
    begin = time.monotonic()
    for i, connection in enumerate(slow):
        connection.sendall(b"GET /li" if i % 2 == 0 else head)
    for _ in range(10):
        for connection in slow:
            try:
                connection.sendall(b"x")
            except (BrokenPipeError, ConnectionResetError):
                pass
        assert requests.get(daemon.url + "/live", timeout=1).status_code == 200
        time.sleep(0.1)
    for i, connection in enumerate(slow):
        answer = connection.recv(65536)
        assert b" 408 " in answer and (b"header_seconds" if i % 2 == 0 else b"body_seconds") in answer, (i, answer)
        connection.close()
    assert time.monotonic() - begin < 15
    assert_unharmed(daemon)


def test_pipelined_requests_are_answered_in_order(fake):
    def request(path, body):
        data = json.dumps(body).encode()
        return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
            path.encode(), len(data), data)

    long = {"prompt": "abc", "max_tokens": 50, "ignore_eos": True, "stream": True}
    with socket.create_connection(("127.0.0.1", fake.http_port), timeout=30) as connection:
        connection.sendall(request("/v1/completions", long) + request("/tokenize", {"prompt": "hello"}) +
                           request("/v1/completions", {"temperature": 9}) + b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        held = b""
        while b'"alive"' not in held:
            piece = connection.recv(65536)
            assert piece, held
            held += piece
    order = [held.index(mark) for mark in (b"text/event-stream", b"data: [DONE]", b'"tokens":[260]', b"HTTP/1.1 400", b'"alive"')]
    assert order == sorted(order), order
    assert_unharmed(fake)


def test_wrong_protocols(fake):
    """Each door meets bytes that are meant for the other, and TLS."""
    http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9
    tls = bytes.fromhex("16030100c8010000c40303") + b"\0" * 100
    for port in (fake.http_port, fake.grpc_port):
        for noise in (http2, tls, b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n", bytes(range(256)) * 64):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                try:
                    connection.sendall(noise)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)
                except OSError:  # closed or reset at any of these, as quick as the door was
                    pass
    assert_unharmed(fake)


def test_clients_that_come_and_go(fake):
    """Requests given up at any point, over both forms."""
    def visit(i):
        body = json.dumps({"prompt": "abc" * (i % 40 + 1), "max_tokens": 300, "ignore_eos": True, "stream": i % 2 == 0, "n": i % 3 + 1})
        with socket.create_connection(("127.0.0.1", fake.http_port), timeout=30) as connection:
            text = (f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n{body}").encode()
            connection.sendall(text[:len(text) - i % 5 * 7])
            time.sleep(i % 7 * 0.01)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(visit, range(200)))
    assert_unharmed(fake)


def test_clients_that_do_not_read(fake, moed_pb):
    """Streams of which nothing is taken hold nobody up, and end with their clients."""
    def ask():
        body = {"prompt": "hello", "max_tokens": 30, "temperature": 0, "seed": 9, "ignore_eos": True}
        return requests.post(fake.url + "/v1/completions", json=body, timeout=30).json()["choices"][0]["text"]

    alone = ask()
    body = json.dumps({"prompt": "abc", "max_tokens": 1000, "n": 8, "logprobs": 20, "ignore_eos": True, "stream": True})
    text = (f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}").encode()
    stalled = []
    for _ in range(8):
        stalled.append(socket.socket())
        stalled[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled[-1].connect(("127.0.0.1", fake.http_port))
        stalled[-1].sendall(text)
    pb, services = moed_pb
    with grpc.insecure_channel(fake.grpc_target) as channel:
        options = pb.SamplingOptions(max_tokens=1000, n=8, logprobs=20, ignore_eos=True)
        streams = [services.InferenceStub(channel).Generate(pb.GenerateRequest(text="abc", sampling=options)) for _ in range(8)]
        for _ in range(5):
            assert ask() == alone
        for stream in streams:
            stream.cancel()
    for connection in stalled:
        connection.close()
    assert_unharmed(fake)


def test_a_template_that_loops_for_ever(start_fake, tiny_model, tmp_path):
    folder = tmp_path / "looping"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{{ a }}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text("{% if messages[0].content == 'loop' %}" + loop + "{% endif %}hi")
    daemon = start_fake("--served-model-name", "x", model=folder)
    begin = time.monotonic()
    answer = requests.post(daemon.url + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "loop"}]}, timeout=30)
    assert answer.status_code == 400 and "template" in answer.json()["error"]["message"], answer.text
    assert time.monotonic() - begin < 5
    answer = requests.post(daemon.url + "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 2}, timeout=30)
    assert answer.status_code == 200, answer.text
    assert_unharmed(daemon)
