"""One line a request in the log, of either door, however the request ended; none holds a prompt, a query or a key."""

import http.client
import json
import re
import socket
import time

import grpc
import pytest
import requests

KEY = "the-key-of-this-test"
SECRET = "words-of-a-prompt"
BODY = {"prompt": SECRET, "max_tokens": 2, "ignore_eos": True}


def requests_in(daemon, level="info"):
    """The request lines so far as dicts, their time and level counted; every line of the log must be JSON."""
    found = []
    for text in daemon.log.splitlines():
        if not text.startswith("{"):
            continue
        line = json.loads(text)
        if line["message"].startswith("request id=") and level in (line["level"], "any"):
            found.append(dict(pair.split("=", 1) for pair in line["message"].split()[1:]) | {"level": line["level"]})
    return found


def wait_lines(daemon, count, level="info", seconds=10):
    """The lines when there are so many. Those of different connections come in any order: a door writes one when all is
    over, and its client may have its answer before."""
    end = time.monotonic() + seconds
    while len(requests_in(daemon, level)) < count and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.1)  # for one too many
    lines = requests_in(daemon, level)
    assert len(lines) == count, lines
    return lines


def exchange(daemon, data, wait=True):
    """(status, request id) of the answer to `data`."""
    with socket.create_connection(("127.0.0.1", daemon.http_port), timeout=20) as connection:
        connection.sendall(data)
        answer = connection.recv(65536).decode() if wait else ""
    return (int(answer[9:12]), re.search(r"^X-Request-Id: (\S+)\r$", answer, re.M)[1]) if wait else None


def post(path, body=b"", headers=""):
    return (f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n{headers}\r\n").encode() + body


def test_what_is_refused_before_its_handler(start_fake):
    daemon = start_fake("--log-json", "--header-seconds", "0.4", "--body-seconds", "0.4", "--body-bytes-max", "2000",
                        "--header-bytes-max", "2000", "--connections-max", "8", MOED_API_KEY=KEY)
    odd = b'/no"such\\thing' + bytes([0xC3, 0xA9]) + b"x" * 300
    slow = post("/v1/completions").replace(b"Content-Length: 0", b"Content-Length: 100")
    cases = [
        (post("/nothing?q=" + SECRET), 404, "POST", "/nothing"),
        (b"GET " + odd + b" HTTP/1.1\r\nHost: x\r\n\r\n", 404, "GET", '/no"such\\thing\\xc3\\xa9' + "x" * 112),
        (b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 405, "DELETE", "/v1/models"),
        (b"BREW /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 405, "BREW", "/v1/models"),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong-" + SECRET.encode() + b"\r\n\r\n", 401, "GET",
         "/v1/models"),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 401, "GET", "/metrics"),
        (post("/v1/completions").replace(b"application/json", b"text/plain"), 415, "POST", "/v1/completions"),
        (post("/tokenize", headers="Content-Encoding: gzip\r\n"), 415, "POST", "/tokenize"),
        (post("/v1/completions", b'{"prompt": "%s"}' % (SECRET.encode() * 200)), 413, "POST", "/v1/completions"),
        (slow, 408, "POST", "/v1/completions"),
        (b"GET /live HTTP/1.1\r\nHost:", 408, "GET", "/live"),
        (b"GET /live HTTP/1.1\r\nX: " + b"a" * 3000 + b"\r\n\r\n", 431, "GET", "/live"),
        (b"\x16\x03\x01nonsense\r\n\r\n", 400, "-", "-"),
        (post("/v1/completions", b'{"prompt": "%s", "n": 0}' % SECRET.encode()), 400, "POST", "/v1/completions"),
        (post("/v1/completions", b'{"prompt": "%s", "n": "x"}' % SECRET.encode()), 400, "POST", "/v1/completions"),
        (post("/tokenize", b'{"prompt": 5}'), 400, "POST", "/tokenize"),
    ]
    for number, (data, status, method, path) in enumerate(cases):
        assert exchange(daemon, data)[0] == status, data[:80]
        line = wait_lines(daemon, number + 1)[-1]
        assert (line["status"], line["method"], line["path"]) == (str(status), method, path)
        assert 0 <= int(line["total_ms"]) < 5000
        assert status != 408 or int(line["total_ms"]) >= 400
    assert [line.get("field") for line in requests_in(daemon)[-3:]] == ["n", "n", "prompt"]
    assert SECRET not in daemon.log and KEY not in daemon.log


def test_the_id_is_the_answer_s(start_fake):
    daemon = start_fake("--log-json")
    asked = [exchange(daemon, b"nonsense\r\n\r\n"), exchange(daemon, b"GET /no HTTP/1.1\r\nX-Request-Id: mine-1\r\n\r\n"),
             exchange(daemon, b"GET /v1/models HTTP/1.1\r\nX-Request-Id: not mine\r\n\r\n")]
    assert sorted((int(line["status"]), line["id"]) for line in wait_lines(daemon, 3)) == sorted(asked)
    assert asked[1][1] == "mine-1" and re.fullmatch("[0-9a-f]{32}", asked[2][1])


def test_connections_beyond_the_limit_leave_a_line(start_fake):
    daemon = start_fake("--log-json", "--connections-max", "1")
    with socket.create_connection(("127.0.0.1", daemon.http_port), timeout=20):
        time.sleep(0.2)
        assert exchange(daemon, b"")[0] == 503
        assert [(line["method"], line["path"], line["status"]) for line in wait_lines(daemon, 1)] == [("-", "-", "503")]


def test_answers_and_clients_that_leave(start_fake):
    daemon = start_fake("--log-json", FAKE_LAYER_US="2000")
    url = daemon.url + "/v1/completions"
    assert requests.post(url, json=BODY, timeout=20).status_code == 200
    assert requests.post(url, json=BODY | {"stream": True}, timeout=20).status_code == 200
    lines = sorted(wait_lines(daemon, 2), key=lambda line: line["stream"])
    for line, stream in zip(lines, ("false", "true")):
        assert line["outcome"] == "done" and line["stream"] == stream and line["status"] == "200"
        assert (line["method"], line["path"], line["completion_tokens"]) == ("POST", "/v1/completions", "2")
        assert line["prompt_tokens"] == str(len(SECRET)) and 4 <= int(line["ttft_ms"]) <= int(line["total_ms"])
    for stream in (False, True):
        connection = http.client.HTTPConnection("127.0.0.1", daemon.http_port, timeout=20)
        connection.request("POST", "/v1/completions", json.dumps(BODY | {"max_tokens": 900, "stream": stream}),
                           {"Content-Type": "application/json"})
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        time.sleep(0.1)
        connection.close()
    plain, streamed = sorted(wait_lines(daemon, 4)[2:], key=lambda line: line["stream"])
    assert (plain["status"], plain["outcome"], plain["stream"]) == ("499", "left", "false")
    assert (streamed["status"], streamed["outcome"], streamed["stream"]) == ("200", "left", "true")
    assert int(streamed["completion_tokens"]) > 0
    assert requests.post(daemon.url + "/tokenize", json={"prompt": SECRET}, timeout=20).status_code == 200
    exchange(daemon, post("/tokenize", b"{}")[:-1], wait=False)  # left in its body
    last = wait_lines(daemon, 6)[4:]
    assert sorted((line["path"], line["status"], line.get("outcome")) for line in last) == [
        ("/tokenize", "200", None), ("/tokenize", "499", "left")]
    assert SECRET not in daemon.log


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_not_taken_is_not_done(start_fake, stream):
    daemon = start_fake("--log-json", "--write-seconds", "0.5")
    body = json.dumps({"prompt": SECRET, "n": 16, "max_tokens": 900, "ignore_eos": True, "logprobs": 20, "stream": stream})

    def ask():
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", daemon.http_port))
        connection.sendall(post("/v1/completions", body.encode()))
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        return connection

    with ask():
        line = wait_lines(daemon, 1)[0]
        assert (line["status"], line["outcome"]) == ("200", "cut")
    ask().close()
    line = wait_lines(daemon, 2)[1]
    assert (line["status"], line["outcome"]) == ("200", "left")


def test_a_call_that_was_not_read_is_not_done(start_fake, moed_pb):
    pb, services = moed_pb
    daemon = start_fake("--log-json", "--write-seconds", "2")
    sampling = pb.SamplingOptions(n=16, max_tokens=900, ignore_eos=True, logprobs=20)
    with grpc.insecure_channel(daemon.grpc_target, [("grpc.http2.bdp_probe", 0)]) as channel:
        stub = services.InferenceStub(channel)
        answer = stub.Generate(pb.GenerateRequest(text=SECRET, sampling=sampling))
        next(answer)
        line = wait_lines(daemon, 1)[0]
        assert (line["status"], line["outcome"]) == ("CANCELLED", "cut")
        answer = stub.Generate(pb.GenerateRequest(text=SECRET, sampling=sampling))
        next(answer)
        time.sleep(0.5)
        answer.cancel()
        line = wait_lines(daemon, 2)[1]
        assert (line["status"], line["outcome"]) == ("CANCELLED", "left")


def test_probes_are_for_debugging(start_fake):
    daemon = start_fake("--log-json", "--log-level", "debug")
    for path in ("/live", "/health", "/ready", "/metrics"):
        assert requests.get(daemon.url + path, timeout=10).status_code == 200
    assert requests.post(daemon.url + "/live", timeout=10).status_code == 405
    lines = wait_lines(daemon, 5, "any")
    assert sorted(line["level"] for line in lines) == ["debug"] * 4 + ["info"]


def test_names_with_quotes_leave_json(start_fake):
    """An unknown field is named once, whatever its name is."""
    daemon = start_fake("--log-json")
    for _ in range(2):
        body = json.dumps(BODY | {'say "hi"\\\x1b[31m': 1})
        assert requests.post(daemon.url + "/v1/completions", data=body, timeout=10,
                             headers={"Content-Type": "application/json"}).status_code == 200
    wait_lines(daemon, 2)
    named = [json.loads(line)["message"] for line in daemon.log.splitlines() if "unknown" in line]
    assert named == ['request field say\\x20"hi"\\\\x1b[31m is unknown and ignored']


def test_grpc(start_fake, moed_pb):
    pb, services = moed_pb
    daemon = start_fake("--log-json", FAKE_LAYER_US="2000", MOED_API_KEY=KEY)
    metadata = [("authorization", f"Bearer {KEY}")]
    options = pb.SamplingOptions(max_tokens=2, ignore_eos=True)
    chat = pb.ChatCompletionRequest(messages=[pb.ChatMessage(role="user", content=SECRET)], sampling=options, request_id="mine-2")
    with grpc.insecure_channel(daemon.grpc_target) as channel:
        stub = services.InferenceStub(channel)
        raw = channel.unary_unary("/moed.v1.Inference/ChatCompletion", request_serializer=bytes)
        refused = [
            (lambda: stub.ChatCompletion(chat, timeout=10), "UNAUTHENTICATED", "ChatCompletion"),
            (lambda: stub.Tokenize(pb.TokenizeRequest(text=SECRET), timeout=10), "UNAUTHENTICATED", "Tokenize"),
            (lambda: stub.GetLoads(pb.GetLoadsRequest(), timeout=10), "UNAUTHENTICATED", "GetLoads"),
            (lambda: raw(b"\xff" * 100, timeout=10, metadata=metadata), "INVALID_ARGUMENT", "ChatCompletion"),
            (lambda: stub.ChatCompletion(pb.ChatCompletionRequest(model="other"), timeout=10, metadata=metadata), "NOT_FOUND",
             "ChatCompletion"),
            (lambda: list(stub.Generate(pb.GenerateRequest(text=SECRET, sampling=pb.SamplingOptions(n=0)), timeout=10,
                                        metadata=metadata)), "INVALID_ARGUMENT", "Generate"),
            (lambda: stub.Tokenize(pb.TokenizeRequest(), timeout=10, metadata=metadata), "INVALID_ARGUMENT", "Tokenize"),
            (lambda: stub.ChatCompletion(pb.ChatCompletionRequest(messages=chat.messages, sampling=pb.SamplingOptions(
                max_tokens=900, ignore_eos=True)), timeout=0.3, metadata=metadata), "CANCELLED", "ChatCompletion"),
        ]
        for number, (call, status, method) in enumerate(refused):
            with pytest.raises(grpc.RpcError):
                call()
            line = wait_lines(daemon, number + 1)[-1]
            assert (line["status"], line["method"], line["path"]) == (status, "gRPC", "/moed.v1.Inference/" + method)
            assert re.fullmatch("[0-9a-f]{32}", line["id"])
            assert line["outcome"] == ("left" if status == "CANCELLED" else "refused")
        assert requests_in(daemon)[5]["field"] == "n"
        stub.ChatCompletion(chat, timeout=10, metadata=metadata)
        assert list(stub.StreamChatCompletion(chat, timeout=10, metadata=metadata))
        stub.Tokenize(pb.TokenizeRequest(text=SECRET), timeout=10, metadata=metadata)
        stub.GetLoads(pb.GetLoadsRequest(), timeout=10, metadata=metadata)  # at level debug
        plain, streamed, tokens = sorted(wait_lines(daemon, len(refused) + 3)[-3:], key=lambda line: line["path"])
    for line, stream in ((plain, "false"), (streamed, "true")):
        assert (line["id"], line["status"], line["outcome"], line["stream"]) == ("mine-2", "OK", "done", stream)
        assert line["completion_tokens"] == "2" and 4 <= int(line["ttft_ms"]) <= int(line["total_ms"])
    assert (tokens["status"], tokens["path"]) == ("OK", "/moed.v1.Inference/Tokenize")
    assert SECRET not in daemon.log and KEY not in daemon.log
