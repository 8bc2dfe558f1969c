"""What ends a request or the daemon early: signals, a drain, the time that a request may take."""

import http.client
import json
import select
import signal
import socket
import threading
import time

import grpc
import pytest
import requests
from conftest import LOADING
from grpc_health.v1 import health_pb2, health_pb2_grpc

# Some 10 MB in 14400 events: more than sockets hold, less than a door may leave unread.
LARGE = {"prompt": "abc", "n": 16, "max_tokens": 900, "ignore_eos": True, "logprobs": 20, "stream": True}
# A gRPC client whose window does not grow with what comes.
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0)]
# About a minute: four layers of 10 ms a token.
LONG = {"prompt": "abc", "max_tokens": 900, "ignore_eos": True}


def post(daemon, body, answers):
    answers.append(requests.post(daemon.url + "/v1/completions", json=body, timeout=60))


def running(daemon):
    text = requests.get(daemon.url + "/metrics", timeout=10).text
    return any(line.startswith("vllm:num_requests_running{") and float(line.split()[-1]) > 0 for line in text.splitlines())


def says(daemon, text):
    """Whether the log of a daemon that may be gone has it: its last lines are still being read."""
    end = time.monotonic() + 5
    while text not in daemon.log and time.monotonic() < end:
        time.sleep(0.01)
    return text in daemon.log


def wait_running(daemon):
    end = time.monotonic() + 10
    while not running(daemon):
        assert time.monotonic() < end, daemon.log
        time.sleep(0.01)


def wait_generated(daemon, tokens):
    """Until all is generated, whoever may have read it."""
    end = time.monotonic() + 20
    while f'generation_tokens_total{{engine="0",model_name="tiny"}} {tokens}' not in requests.get(daemon.url + "/metrics", timeout=10).text:
        assert time.monotonic() < end, daemon.log
        time.sleep(0.05)


def slow_socket(daemon, body):
    """A client with a small receive buffer that has sent `body` and read nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", daemon.http_port))
    data = json.dumps(body).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return connection


def read_all(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    data = b""
    while piece := connection.recv(1 << 20):
        data += piece
    return data


def test_a_signal_while_loading_is_obeyed(start_fake):
    daemon = start_fake(said=LOADING, FAKE_LOAD_MS="20000")
    begin = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - begin < 5
    assert says(daemon, "stopped while loading")


def test_a_second_signal_does_not_wait(start_fake):
    daemon = start_fake("--drain-seconds", "60", FAKE_LAYER_US="10000")
    answer = requests.post(daemon.url + "/v1/completions", json=LONG | {"stream": True}, stream=True, timeout=60)
    lines = answer.iter_lines()  # kept: the connection closes with it
    next(lines)
    daemon.process.terminate()
    daemon.wait_log("draining")
    time.sleep(0.3)
    assert daemon.process.poll() is None
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.process.wait(2) == 1
    assert says(daemon, "second signal")


def test_an_answer_past_the_drain_fails(start_fake):
    daemon = start_fake("--drain-seconds", "0.3", FAKE_LAYER_US="10000")
    answers = []
    client = threading.Thread(target=post, args=(daemon, LONG, answers))
    client.start()
    wait_running(daemon)
    assert daemon.stop() == 0
    client.join()
    assert answers[0].status_code == 503


def test_a_stream_past_the_drain_ends_in_an_error(start_fake):
    daemon = start_fake("--drain-seconds", "0.3", FAKE_LAYER_US="10000")
    answer = requests.post(daemon.url + "/v1/completions", json=LONG | {"stream": True}, stream=True, timeout=60)
    lines = answer.iter_lines()
    assert next(lines).startswith(b"data: ")
    daemon.process.terminate()
    data = [line for line in lines if line.startswith(b"data: ")]
    assert daemon.process.wait(20) == 0
    error = json.loads(data[-1][len(b"data: "):])["error"]
    assert error["message"] == "the server is shutting down" and error["code"] == "unavailable"
    assert b"data: [DONE]" not in data


def test_a_drain_waits_for_what_is_still_tokenised(start_fake):
    """All is sent, and tokenising it takes a second. When it has been received cannot be seen from outside: later and later."""
    body = json.dumps({"prompt": ["hello" * 1000] * 1000, "max_tokens": 1})
    for delay in (0.15, 0.3, 0.6, 1.2):
        daemon = start_fake("--drain-seconds", "30")
        connection = http.client.HTTPConnection("127.0.0.1", daemon.http_port, timeout=60)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        time.sleep(delay)
        assert not select.select([connection.sock], [], [], 0)[0], "answered before the drain began"
        assert daemon.stop() == 0
        answer = connection.getresponse()
        if answer.status == 200:
            return
        assert answer.status == 503, answer.read()
    raise AssertionError("refused after all")


def test_a_drain_waits_for_a_slow_reader(start_fake):
    """All is generated, most is not yet read: that takes more than the seconds that closing takes at least."""
    daemon = start_fake("--drain-seconds", "30", "--log-json")
    with slow_socket(daemon, LARGE) as connection:
        wait_generated(daemon, 14400)
        daemon.process.terminate()
        daemon.wait_log("draining")
        time.sleep(4)
        assert daemon.process.poll() is None
        answer = read_all(connection)
        assert len(answer) > 8 << 20
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert daemon.process.wait(5) == 0
    assert says(daemon, "outcome=done")


def test_a_drain_waits_for_a_slow_reader_of_grpc(start_fake, moed_pb):
    pb, services = moed_pb
    daemon = start_fake("--drain-seconds", "30", "--log-json")
    sampling = pb.SamplingOptions(n=16, max_tokens=900, ignore_eos=True, logprobs=20)
    with grpc.insecure_channel(daemon.grpc_target, SMALL_WINDOW) as channel:
        answer = services.InferenceStub(channel).Generate(pb.GenerateRequest(text="abc", sampling=sampling))
        next(answer)
        wait_generated(daemon, 14400)
        daemon.process.terminate()
        daemon.wait_log("draining")
        time.sleep(5)
        assert list(answer)[-1].usage.completion_tokens == 14400
        assert daemon.process.wait(5) == 0
    assert says(daemon, "outcome=done")


def test_a_drain_does_not_wait_for_who_watches_it(start_fake):
    """A balancer that watches our health does so for as long as we are there."""
    daemon = start_fake("--drain-seconds", "30")
    with grpc.insecure_channel(daemon.grpc_target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        begin = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - begin < 10


def test_a_reader_that_outlasts_the_drain_is_cut(start_fake, moed_pb):
    pb, services = moed_pb
    daemon = start_fake("--drain-seconds", "0.1", "--log-json")
    sampling = pb.SamplingOptions(n=16, max_tokens=900, ignore_eos=True, logprobs=20)
    with slow_socket(daemon, LARGE), grpc.insecure_channel(daemon.grpc_target, SMALL_WINDOW) as channel:
        answer = services.InferenceStub(channel).Generate(pb.GenerateRequest(text="abc", sampling=sampling))
        next(answer)
        wait_generated(daemon, 28800)
        assert daemon.stop(10) == 0
        with pytest.raises(grpc.RpcError):
            list(answer)
    assert says(daemon, "stopped")
    lines = [line for line in daemon.log.splitlines() if "request id=" in line and "completion" in line]
    assert ["outcome=cut" in line for line in lines] == [True, True], lines
    assert ["status=200" in line or "status=CANCELLED" in line for line in lines] == [True, True], lines


def test_a_request_may_take_only_so_long(start_fake):
    daemon = start_fake("--request-seconds", "0.5", FAKE_LAYER_US="10000")
    url = daemon.url + "/v1/completions"
    plain = requests.post(url, json=LONG, timeout=20)
    assert plain.status_code == 408, plain.text
    assert "0.5 s (limits.request_seconds)" in plain.json()["error"]["message"]
    lines = list(requests.post(url, json=LONG | {"stream": True}, stream=True, timeout=20).iter_lines())
    data = [line for line in lines if line.startswith(b"data: ")]
    assert len(data) > 2
    assert "limits.request_seconds" in json.loads(data[-1][len(b"data: "):])["error"]["message"]
    assert requests.post(url, json=LONG | {"max_tokens": 1}, timeout=20).status_code == 200
