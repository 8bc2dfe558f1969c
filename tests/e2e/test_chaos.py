"""Honest clients beside clients that leave at random moments, stall, send half a request, flood and ask for the maximum, over
both doors, with KV for a fraction of them: on the host, and on an emulated device under a tight cap.

MOED_CHAOS_SECONDS   how long, in all, on each (default 60)
MOED_CHAOS_SEED      of every random choice (default 1)
"""

import collections
import concurrent.futures
import json
import os
import random
import re
import socket
import struct
import threading
import time

import grpc
import pytest
import requests
from conftest import DEMO, MOED, Daemon

SEED = int(os.environ.get("MOED_CHAOS_SEED", "1"))
CONTEXT_TOKENS = 256
DEVICES = {
    # KV for two contexts.
    "host": ["--kv-gib", "0.0113"],
    # One expert of each layer stays, the others go through slots for a quarter of them; KV on both sides.
    "emulated": ["--device", "emulated", "--device-memory-gib", "0.47", "--policy", "hot", "--kv", "split",
                 "--device-kv-gib", "0.003", "--kv-gib", "0.006", "--halves", "2", "--resident-experts", "1"],
}
LIMITS = ["--max-model-len", str(CONTEXT_TOKENS), "--pass-rows-max", "128", "--bulk-rows-min", "16", "--queue-max", "16",
          "--sequences-max", "12", "--connections-max", "60", "--header-seconds", "2", "--body-seconds", "2"]
# What a refusal under load must name.
EXPLAINED = re.compile(r"queue_max|queue_tokens_max|connections_max|reading_bytes_max|queued_text_bytes_max")
RSS_SLACK_MIB = 24
QUESTIONS = [
    {"content": "What is the capital of France?", "max_tokens": 12},
    {"content": "Say hello.", "max_tokens": 16, "ignore_eos": True},
    {"content": "Tell me about rain." + " Be kind." * 12, "max_tokens": 10},
    {"content": "Name a fruit.", "max_tokens": 16, "temperature": 1.0, "seed": 7},
    {"content": "Tell me about iron." + " Be brief." * 30, "max_tokens": 8, "stop": ["."]},
]


def chat_body(question, **options):
    fields = {"temperature": 0} | question | options
    return fields | {"messages": [{"role": "user", "content": fields.pop("content")}]}


class Refused(Exception):
    """The daemon has too much to do and says so."""


class Doors:
    """The four ways to ask a question; each gives (text, finish reason, tokens), or raises Refused."""

    def __init__(self, daemon, moed_pb):
        self.daemon = daemon
        self.pb, services = moed_pb
        self.channel = grpc.insecure_channel(daemon.grpc_target)
        self.stub = services.InferenceStub(self.channel)
        self.ways = {"HTTP": self.http, "HTTP stream": self.http_stream, "gRPC": self.grpc, "gRPC stream": self.grpc_stream}

    def close(self):
        self.channel.close()

    def post(self, body, stream):
        answer = requests.post(self.daemon.url + "/v1/chat/completions", json=body, timeout=300, stream=stream)
        if answer.status_code in (429, 503):
            assert EXPLAINED.search(answer.text) and int(answer.headers["Retry-After"]) > 0, (answer.headers, answer.text)
            raise Refused
        assert answer.status_code == 200, (answer.status_code, answer.text)
        return answer

    def http(self, question):
        answer = self.post(chat_body(question), False).json()
        choice = answer["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], answer["usage"]["completion_tokens"]

    def http_stream(self, question):
        text, reason, usage, ended = "", None, None, False
        with self.post(chat_body(question, stream=True, stream_options={"include_usage": True}), True) as answer:
            for line in answer.iter_lines():
                if not line or line.startswith(b":"):  # a sign of life
                    continue
                assert line.startswith(b"data: ") and not ended, line
                ended = line == b"data: [DONE]"
                if ended:
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
        assert ended and usage is not None, (text, reason, usage)
        return text, reason, usage["completion_tokens"]

    def message(self, question, **options):
        fields = {"temperature": 0} | question | options
        user = self.pb.ChatMessage(role="user", content=fields.pop("content"))
        return self.pb.ChatCompletionRequest(messages=[user], sampling=self.pb.SamplingOptions(**fields))

    def reason(self, value):
        return {self.pb.FINISH_REASON_STOP: "stop", self.pb.FINISH_REASON_LENGTH: "length"}[value]

    def call(self, method, question):
        try:
            return method(self.message(question), timeout=300)
        except grpc.RpcError as error:
            self.refused(error)

    def refused(self, error):
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, (error.code(), error.details())
        assert EXPLAINED.search(error.details()), error.details()
        raise Refused from error

    def grpc(self, question):
        answer = self.call(self.stub.ChatCompletion, question)
        choice = answer.choices[0]
        return choice.message.content, self.reason(choice.finish_reason), answer.usage.completion_tokens

    def grpc_stream(self, question):
        text, reason, tokens = "", None, None
        try:
            for chunk in self.stub.StreamChatCompletion(self.message(question), timeout=300):
                text += chunk.choice.content
                reason = self.reason(chunk.choice.finish_reason) if chunk.choice.finish_reason else reason
                tokens = chunk.usage.completion_tokens if chunk.HasField("usage") else tokens
        except grpc.RpcError as error:
            assert not text, "a stream that had begun was refused"
            self.refused(error)
        return text, reason, tokens


class Crowd:
    """Everybody at once. Hostile clients note each HTTP status and gRPC code they meet, honest ones each way they were
    answered; what must not be is in `faults`."""

    def __init__(self, doors, expected):
        self.doors, self.daemon, self.expected = doors, doors.daemon, expected
        self.met = collections.Counter()
        self.faults = []
        self.lock = threading.Lock()

    def note(self, *what):
        with self.lock:
            self.met[what] += 1

    def run(self, seconds, seed):
        self.end = time.monotonic() + seconds
        hostile = [self.leave, self.leave, self.leave, self.leave_grpc, self.leave_grpc, self.stall, self.stall_grpc, self.half,
                   self.half, self.flood, self.flood, self.greedy, self.greedy_grpc, self.too_much]
        tasks = [(self.honest, way) for way in self.doors.ways] + [(self.repeat, visit) for visit in hostile]
        with concurrent.futures.ThreadPoolExecutor(len(tasks)) as pool:
            for index, (task, argument) in enumerate(tasks):
                pool.submit(self.guarded, task, argument, random.Random(seed * 1000 + index))

    def guarded(self, task, argument, dice):
        try:
            task(argument, dice)
        except Exception as error:  # whatever it is, the test shows it
            with self.lock:
                self.faults.append((getattr(argument, "__name__", argument), repr(error)[:2000]))

    def repeat(self, visit, dice):
        while time.monotonic() < self.end:
            visit(dice)
            time.sleep(dice.random() * 0.3)

    def honest(self, way, dice):
        while time.monotonic() < self.end:
            index = dice.randrange(len(QUESTIONS))
            patience = time.monotonic() + 200
            while True:
                try:
                    answer = self.doors.ways[way](QUESTIONS[index])
                    break
                except Refused:
                    self.note("honest refused", way)
                    assert time.monotonic() < patience, "nobody lets an honest client in"
                    time.sleep(0.2 + dice.random())
            assert answer == self.expected[index], (QUESTIONS[index], answer, self.expected[index])
            self.note("honest answered", way)

    def connect(self, small_window=False):
        made = socket.socket()
        if small_window:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        made.settimeout(30)
        made.connect(("127.0.0.1", self.daemon.http_port))
        return made

    def leave_by(self, connection, dice):
        if dice.random() < 0.5:  # with a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def send(self, connection, data):
        try:
            connection.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused at the door

    def read(self, connection, seconds):
        """What comes until the other side closes, or for so long; each answer's status is noted."""
        held, end = b"", time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            connection.settimeout(max(left, 0.01))
            try:
                piece = connection.recv(65536)
            except (TimeoutError, ConnectionResetError):
                break
            if not piece:
                break
            held += piece
        for status in re.findall(rb"HTTP/1\.1 (\d+) ", held):
            self.note("HTTP", int(status))
        if re.match(rb"HTTP/1\.1 (429|503) ", held):
            assert EXPLAINED.search(held.decode()) and b"Retry-After" in held, held
        return held

    def request(self, dice, **options):
        body = json.dumps(chat_body(dice.choice(QUESTIONS), **options)).encode()
        return (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body))

    def leave(self, dice):
        connection = self.connect()
        self.send(connection, self.request(dice, stream=dice.random() < 0.6, n=dice.randint(1, 3),
                                           max_tokens=dice.randint(1, 60), ignore_eos=True, logprobs=dice.random() < 0.3))
        self.read(connection, dice.random() ** 2 * 3)
        self.leave_by(connection, dice)

    def finish_grpc(self, act):
        try:
            act()
            self.note("gRPC", grpc.StatusCode.OK)
        except grpc.RpcError as error:
            self.note("gRPC", error.code())
            if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                assert EXPLAINED.search(error.details()), error.details()

    def leave_grpc(self, dice):
        question = self.doors.message(dice.choice(QUESTIONS), max_tokens=dice.randint(1, 60), ignore_eos=True, n=dice.randint(1, 3))

        def cancelled_midway():
            stream = self.doors.stub.StreamChatCompletion(question, timeout=60)
            for _, _ in zip(range(dice.randint(1, 10)), stream):
                pass
            stream.cancel()

        if dice.random() < 0.5:
            self.finish_grpc(cancelled_midway)
        else:
            self.finish_grpc(lambda: self.doors.stub.ChatCompletion(question, timeout=0.02 + dice.random() * 2))

    def stall(self, dice):
        """A long answer that nobody reads; then perhaps all of it."""
        connection = self.connect(small_window=True)
        self.send(connection, self.request(dice, stream=True, max_tokens=100, ignore_eos=True, logprobs=True, top_logprobs=20))
        time.sleep(dice.random() * 4)
        if dice.random() < 0.3:
            self.read(connection, 5)
        self.leave_by(connection, dice)

    def stall_grpc(self, dice):
        stream = self.doors.stub.StreamChatCompletion(
            self.doors.message(dice.choice(QUESTIONS), max_tokens=100, ignore_eos=True, logprobs=20), timeout=60)
        time.sleep(dice.random() * 4)
        stream.cancel()

    def half(self, dice):
        connection = self.connect()
        whole = self.request(dice)
        self.send(connection, whole[:dice.randrange(len(whole))])
        if dice.random() < 0.3:
            try:
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # refused at the door
        self.read(connection, dice.choice([0, 0.1, 3]))
        self.leave_by(connection, dice)

    def flood(self, dice):
        connections = [self.connect() for _ in range(dice.randint(10, 30))]
        for connection in connections:
            self.send(connection, self.request(dice, max_tokens=3))
        for connection in connections:
            self.read(connection, 0.2)
            self.leave_by(connection, dice)
        time.sleep(dice.random() * 2)

    def greedy(self, dice):
        """As many tokens, choices and scores as there may be, with patience for a few seconds."""
        connection = self.connect()
        body = {"prompt": [5] * dice.choice([1, 100, CONTEXT_TOKENS - 10]), "n": dice.choice([1, 8, 64]), "ignore_eos": True,
                "logprobs": 20, "temperature": 1, "stream": dice.random() < 0.5}
        body["max_tokens"] = CONTEXT_TOKENS - len(body["prompt"])
        data = json.dumps(body).encode()
        self.send(connection, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                              b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
        self.read(connection, dice.random() * 6)
        self.leave_by(connection, dice)

    def greedy_grpc(self, dice):
        question = self.doors.message({"content": "a " * 100}, max_tokens=100, n=dice.choice([1, 16]), ignore_eos=True)
        self.finish_grpc(lambda: self.doors.stub.ChatCompletion(question, timeout=dice.random() * 6 + 0.1))

    def too_much(self, dice):
        """More than there may be: a prompt beyond the context, a body beyond its limit."""
        connection = self.connect()
        length = dice.choice([100_000, 4_000_000, 40_000_000])
        self.send(connection, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                              b"Connection: close\r\nContent-Length: %d\r\n\r\n" % length)
        self.send(connection, b'{"prompt": "' + b"x" * (min(length, 4_000_000) - 14) + b'"}')
        held = self.read(connection, 4)
        assert not held or re.match(rb"HTTP/1\.1 (400|408|413|429|503) ", held), held[:200]
        self.leave_by(connection, dice)
        time.sleep(dice.random() * 2)


def metric(daemon, name):
    lines = requests.get(daemon.url + "/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((name + "{", name + " ")))


def state_of(daemon):
    return {name: metric(daemon, "vllm:" + name) for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")}


def num_files(daemon):
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def rss_mib(daemon):
    with open(f"/proc/{daemon.process.pid}/status", encoding="ascii") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024


def settle(daemon, files_max):
    """Until nobody is served, no block is in use and the clients' connections are gone; the memory it then holds in MiB."""
    end = time.monotonic() + 60
    while any(state_of(daemon).values()) or num_files(daemon) > files_max:
        assert time.monotonic() < end, (state_of(daemon), num_files(daemon), files_max)
        time.sleep(0.1)
    return rss_mib(daemon)


def crowd_out(daemon):
    """Where the machine is so slow that none of the crowd grew far: a few that stay until one of them had to make room."""
    body = {"prompt": [5], "n": 4, "max_tokens": CONTEXT_TOKENS - 10, "ignore_eos": True, "stream": True}
    held = []
    end = time.monotonic() + 240
    while metric(daemon, "vllm:num_preemptions_total") == 0:
        assert time.monotonic() < end, "nothing was preempted"
        if len(held) < 3:
            held.append(requests.post(daemon.url + "/v1/completions", json=body, stream=True, timeout=240))
            assert held[-1].status_code == 200, held[-1].text
        time.sleep(0.1)
    for answer in held:
        answer.close()


@pytest.mark.parametrize("device", DEVICES)
def test_chaos(device, moed_pb):
    seconds = float(os.environ.get("MOED_CHAOS_SECONDS", "60"))
    daemon = Daemon(MOED, DEMO, "--deterministic", *LIMITS, *DEVICES[device], ready_seconds=300)
    doors = Doors(daemon, moed_pb)
    expected = [doors.http(question) for question in QUESTIONS]
    for index, way in enumerate(doors.ways.values()):
        assert way(QUESTIONS[index]) == expected[index]
    settle(daemon, files_max=1000)  # gauges follow the answer
    files_max = num_files(daemon) + 8  # connections of our own that are kept
    crowd = Crowd(doors, expected)
    held_mib = []
    for half in range(2):
        crowd.run(seconds / 2, SEED * 10 + half)
        held_mib.append(settle(daemon, files_max))
    print(f"seed {SEED}, {device}: MiB held {held_mib}, met {sorted(crowd.met.items(), key=str)}")
    assert not crowd.faults, crowd.faults
    crowd_out(daemon)
    assert [doors.http(question) for question in QUESTIONS] == expected
    settle(daemon, files_max)
    assert all(crowd.met["honest answered", way] > 0 for way in doors.ways), crowd.met
    assert held_mib[1] < held_mib[0] + RSS_SLACK_MIB, held_mib
    codes = {code for door, code in crowd.met if door == "HTTP"}
    assert {200, 400, 429} <= codes <= {200, 400, 408, 413, 429, 503}, crowd.met
    codes = {code for door, code in crowd.met if door == "gRPC"}
    allowed = {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert {code.name for code in codes} <= allowed, crowd.met
    doors.close()
    assert daemon.stop() == 0, daemon.log[-5000:]


@pytest.mark.parametrize("way", ["HTTP", "HTTP stream", "gRPC", "gRPC stream"])
def test_who_leaves_frees_blocks_within_a_layer(start_fake, moed_pb, way):
    """A pass of ten layers of 0.7 s over a long prompt; its client leaves early on."""
    daemon = start_fake(FAKE_LAYERS="10", FAKE_LAYER_US="700000")
    question = {"content": "a" * 400, "max_tokens": 100, "ignore_eos": True}
    doors = Doors(daemon, moed_pb)
    if way.startswith("HTTP"):
        connection = socket.create_connection(("127.0.0.1", daemon.http_port))
        body = json.dumps(chat_body(question, stream=way == "HTTP stream")).encode()
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        leave = connection.close
    else:
        stub = doors.stub
        call = (stub.ChatCompletion.future if way == "gRPC" else stub.StreamChatCompletion)(doors.message(question), timeout=60)
        leave = call.cancel
    end = time.monotonic() + 10
    while state_of(daemon)["kv_cache_usage_perc"] == 0:
        assert time.monotonic() < end, "no block was ever in use"
        time.sleep(0.01)
    left_at = time.monotonic()
    leave()
    while any(state_of(daemon).values()):
        assert time.monotonic() - left_at < 2.5, "the pass went on to its end for nobody"
        time.sleep(0.01)
    doors.close()
