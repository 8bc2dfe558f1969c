"""The gRPC door as the official Python packages meet it, over the fake engine."""

import concurrent.futures
import socket
import time

import grpc
import pytest
import requests
from conftest import LOADING, READY
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


@pytest.fixture
def channel(fake):
    with grpc.insecure_channel(fake.grpc_target) as made:
        yield made


@pytest.fixture
def stub(channel, moed_pb):
    return moed_pb[1].InferenceStub(channel)


def chat(pb, **sampling):
    return pb.ChatCompletionRequest(messages=[pb.ChatMessage(role="user", content="hello")],
                                    sampling=pb.SamplingOptions(ignore_eos=True, temperature=0, seed=1, **sampling))


def test_streamed_chat_equals_unary(stub, moed_pb):
    pb = moed_pb[0]
    unary = stub.ChatCompletion(chat(pb, max_tokens=30), timeout=30)
    chunks = list(stub.StreamChatCompletion(chat(pb, max_tokens=30), timeout=30))
    assert "".join(chunk.choice.content for chunk in chunks) == unary.choices[0].message.content
    assert unary.choices[0].finish_reason == pb.FINISH_REASON_LENGTH
    assert unary.usage.completion_tokens == chunks[-1].usage.completion_tokens == 30
    assert chunks[0].choice.role == "assistant" and unary.model == "tiny"


def test_generate_from_text_and_ids(stub, moed_pb):
    pb = moed_pb[0]
    options = pb.SamplingOptions(max_tokens=8, temperature=0, seed=1, ignore_eos=True, logprobs=1)
    by_text = list(stub.Generate(pb.GenerateRequest(text="abc", sampling=options), timeout=30))
    by_ids = list(stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[97, 98, 99]), sampling=options), timeout=30))
    ids = [token for piece in by_text for token in piece.token_ids]
    assert len(ids) == 8 and ids == [token for piece in by_ids for token in piece.token_ids]
    assert by_text[-1].usage.prompt_tokens == 3


def test_bad_input_is_a_status(stub, moed_pb):
    pb = moed_pb[0]
    cases = [
        (chat(pb, max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (chat(pb, max_tokens=5000), grpc.StatusCode.INVALID_ARGUMENT, "maximum context length is 1024"),
        (chat(pb, top_p=float("nan")), grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        (chat(pb, n=0), grpc.StatusCode.INVALID_ARGUMENT, "n "),
        (pb.ChatCompletionRequest(), grpc.StatusCode.INVALID_ARGUMENT, "messages"),
        (pb.ChatCompletionRequest(model="other"), grpc.StatusCode.NOT_FOUND, "tiny"),
    ]
    for request, code, words in cases:
        with pytest.raises(grpc.RpcError) as caught:
            stub.ChatCompletion(request, timeout=10)
        assert caught.value.code() == code and words in caught.value.details()


def test_deadline_and_cancel_free_the_place(start_fake, moed_pb):
    pb, services = moed_pb
    daemon = start_fake(FAKE_LAYER_US="5000")
    with grpc.insecure_channel(daemon.grpc_target) as channel:
        stub = services.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ChatCompletion(chat(pb, max_tokens=900), timeout=0.5)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        stream = stub.StreamChatCompletion(chat(pb, max_tokens=900))
        next(stream)
        assert stub.GetLoads(pb.GetLoadsRequest(), timeout=5).running >= 1
        stream.cancel()
        end = time.monotonic() + 10
        while (loads := stub.GetLoads(pb.GetLoadsRequest(), timeout=5)).running + loads.waiting > 0:
            assert time.monotonic() < end, loads
            time.sleep(0.02)


def test_full_queue(start_fake, moed_pb):
    pb, services = moed_pb
    daemon = start_fake("--sequences-max", "1", "--queue-max", "1", FAKE_LAYER_US="20000")
    with grpc.insecure_channel(daemon.grpc_target) as channel:
        stub = services.InferenceStub(channel)
        held = [stub.StreamChatCompletion(chat(pb, max_tokens=200))]
        next(held[0])
        held.append(stub.StreamChatCompletion(chat(pb, max_tokens=200)))
        end = time.monotonic() + 10
        while stub.GetLoads(pb.GetLoadsRequest(), timeout=5).waiting < 1:
            assert time.monotonic() < end
            time.sleep(0.02)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ChatCompletion(chat(pb, max_tokens=1), timeout=10)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        for stream in held:
            stream.cancel()


def test_both_doors_share_the_queue(start_fake, moed_pb):
    pb, services = moed_pb
    daemon = start_fake("--sequences-max", "1", "--queue-max", "1", FAKE_LAYER_US="20000")
    body = {"prompt": "abc", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with grpc.insecure_channel(daemon.grpc_target) as channel:
        stub = services.InferenceStub(channel)

        def fill(send):
            # The second may only be sent when the first waits no more: there is room for one.
            held = []
            for wanted in ((1, 0), (1, 1)):
                held.append(send())
                end = time.monotonic() + 10
                while ((loads := stub.GetLoads(pb.GetLoadsRequest(), timeout=5)).running, loads.waiting) != wanted:
                    assert time.monotonic() < end, loads
                    time.sleep(0.01)
            return held

        held = fill(lambda: requests.post(daemon.url + "/v1/completions", json=body, stream=True, timeout=30))
        with pytest.raises(grpc.RpcError) as caught:
            stub.ChatCompletion(chat(pb, max_tokens=1), timeout=10)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "queue_max" in caught.value.details()
        for answer in held:
            answer.close()
        quiet(stub, pb)
        held = fill(lambda: stub.StreamChatCompletion(chat(pb, max_tokens=200)))
        refused = requests.post(daemon.url + "/v1/completions", json=body, timeout=10)
        assert refused.status_code == 429 and "queue_max" in refused.text
        for stream in held:
            stream.cancel()
        quiet(stub, pb)


def test_health_and_reflection(fake, channel):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "moed.v1.Inference"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert "moed.v1.Inference" in services and "grpc.health.v1.Health" in services


def test_keys(start_fake, tmp_path, moed_pb):
    pb, services = moed_pb
    file = tmp_path / "keys"
    file.write_text("secret\n")
    daemon = start_fake("--api-key-file", str(file))
    with grpc.insecure_channel(daemon.grpc_target) as channel:
        stub = services.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=5)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        answer = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=5, metadata=[("authorization", "Bearer secret")])
        assert list(answer.names) == ["tiny"] and answer.max_model_len == 1024
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_tokenize_and_back(stub, moed_pb):
    pb = moed_pb[0]
    tokens = stub.Tokenize(pb.TokenizeRequest(text="hello abc"), timeout=5).token_ids
    assert list(tokens) == [260, 32, 97, 98, 99]
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens), timeout=5).text == "hello abc"
    assert '"limits"' in stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=5).info_json


def quiet(stub, pb, seconds=10):
    end = time.monotonic() + seconds
    while (loads := stub.GetLoads(pb.GetLoadsRequest(), timeout=5)) and loads.running + loads.waiting + loads.kv_usage > 0:
        assert time.monotonic() < end, loads
        time.sleep(0.02)


def test_a_client_without_stubs(fake, channel):
    """What grpcurl does: services, methods and messages by reflection alone."""
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    service = pool.FindServiceByName("moed.v1.Inference")
    assert {method.name for method in service.methods} == {
        "ChatCompletion", "StreamChatCompletion", "Generate", "Tokenize", "Detokenize", "GetModelInfo", "GetServerInfo", "GetLoads"}
    method = service.FindMethodByName("Generate")
    assert method.server_streaming and not method.client_streaming
    request = message_factory.GetMessageClass(method.input_type)(text="abc", sampling={"max_tokens": 5, "ignore_eos": True})
    answer = message_factory.GetMessageClass(method.output_type)
    call = channel.unary_stream("/moed.v1.Inference/Generate", request_serializer=lambda m: m.SerializeToString(),
                                response_deserializer=answer.FromString)
    pieces = list(call(request, timeout=10))
    assert sum(len(piece.token_ids) for piece in pieces) == 5 and pieces[-1].usage.completion_tokens == 5


def test_health_from_loading_to_draining(start_fake, moed_pb):
    pb, services = moed_pb
    daemon = start_fake("--drain-seconds", "20", said=LOADING, FAKE_LOAD_MS="1500", FAKE_LAYER_US="5000")
    with grpc.insecure_channel(daemon.grpc_target) as channel:
        stub, health = services.InferenceStub(channel), health_pb2_grpc.HealthStub(channel)
        changes = health.Watch(health_pb2.HealthCheckRequest(service="moed.v1.Inference"), timeout=30)
        assert next(changes).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.ChatCompletion(chat(pb, max_tokens=1), timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE and "loading" in caught.value.details()
        daemon.wait_log(READY)
        assert next(changes).status == health_pb2.HealthCheckResponse.SERVING
        stream = stub.StreamChatCompletion(chat(pb, max_tokens=60))
        next(stream)
        daemon.process.terminate()
        assert next(changes).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.ChatCompletion(chat(pb, max_tokens=1), timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert list(stream)[-1].usage.completion_tokens == 60, "what had begun may end"
    assert daemon.process.wait(20) == 0


def test_streams_end_by_deadline_or_status(start_fake, moed_pb):
    pb, services = moed_pb
    daemon = start_fake("--request-seconds", "1", FAKE_LAYER_US="5000")
    with grpc.insecure_channel(daemon.grpc_target) as channel:
        stub = services.InferenceStub(channel)
        for timeout, words in [(0.4, ""), (20, "limits.request_seconds")]:
            generate = pb.GenerateRequest(text="abc", sampling=chat(pb, max_tokens=900).sampling)
            for method, request in [(stub.StreamChatCompletion, chat(pb, max_tokens=900)), (stub.Generate, generate)]:
                pieces = []
                with pytest.raises(grpc.RpcError) as caught:
                    for piece in method(request, timeout=timeout):
                        pieces.append(piece)
                assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED and words in caught.value.details()
                assert len(pieces) > 2
        quiet(stub, pb)


def test_both_doors_say_the_same(fake, stub, moed_pb):
    """One validation behind both."""
    pb = moed_pb[0]
    fields = [("temperature", 5.0), ("top_p", 0.0), ("top_k", -9), ("min_p", -1.0), ("n", 1000), ("max_tokens", 0), ("min_tokens", 2000),
              ("max_tokens", 3000), ("presence_penalty", 9.0), ("frequency_penalty", -9.0), ("repetition_penalty", 0.0),
              ("stop", [""]), ("stop", ["x"] * 17), ("stop_token_ids", [-1]), ("bad_words", [""]), ("bad_words", ["a"] * 100),
              ("allowed_token_ids", [999]), ("logprobs", 99), ("prompt_logprobs", 99), ("truncate_prompt_tokens", -9), ("priority", 1 << 40)]
    for field, value in fields:
        answer = requests.post(fake.url + "/v1/completions", json={"prompt": "abc", field: value}, timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(text="abc", sampling=pb.SamplingOptions(**{field: value})), timeout=10))
        assert answer.status_code == 400 and caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == answer.json()["error"]["message"], field
    quiet(stub, pb)


def test_messages_that_are_none(fake, channel, stub, moed_pb):
    pb = moed_pb[0]
    for method in ("ChatCompletion", "Tokenize", "GetLoads", "Generate", "StreamChatCompletion"):
        call = channel.unary_unary("/moed.v1.Inference/" + method, request_serializer=bytes, response_deserializer=bytes)
        if method in ("Generate", "StreamChatCompletion"):
            call = channel.unary_stream("/moed.v1.Inference/" + method, request_serializer=bytes, response_deserializer=bytes)
        noises = [b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f"]
        noises += [b"\x0a\x02\xff\xfe"] if method != "GetLoads" else []  # its message has no such field
        for noise in noises:
            with pytest.raises(grpc.RpcError) as caught:
                list(call(noise, timeout=5))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, (method, noise)
            assert "moed.v1." in caught.value.details()
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/moed.v1.Inference/Nothing", request_serializer=bytes)(b"", timeout=5)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert stub.ChatCompletion(chat(pb, max_tokens=1), timeout=10).choices
    quiet(stub, pb)


def test_many_calls_on_one_connection(fake, stub, moed_pb):
    """Half of them leave; the others get what one alone gets."""
    pb = moed_pb[0]
    alone = stub.ChatCompletion(chat(pb, max_tokens=40), timeout=10).choices[0].message.content

    def ask(i):
        stream = stub.StreamChatCompletion(chat(pb, max_tokens=40), timeout=30)
        if i % 2 == 0:
            return "".join(chunk.choice.content for chunk in stream)
        next(stream)
        stream.cancel()
        return alone

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        assert set(pool.map(ask, range(128))) == {alone}
    quiet(stub, pb)


def test_token_ids_hold_every_token_once(stub, moed_pb):
    pb = moed_pb[0]
    letters = list(range(97, 123))
    options = dict(max_tokens=30, temperature=0, seed=3, ignore_eos=True, allowed_token_ids=letters)

    def generate(**more):
        return list(stub.Generate(pb.GenerateRequest(text="abc", sampling=pb.SamplingOptions(**options, **more)), timeout=10))

    ids = [token for piece in generate() for token in piece.token_ids]
    text = "".join(map(chr, ids))
    cut = generate(stop=[text[5:9]])
    assert "".join(piece.text for piece in cut) == text[:text.index(text[5:9])]
    assert [token for piece in cut for token in piece.token_ids] == ids[:text.index(text[5:9]) + 4]
    ended = generate(stop_token_ids=[ids[4]])
    assert [token for piece in ended for token in piece.token_ids] == ids[:ids.index(ids[4]) + 1]
    assert ended[-2].stop_token_id == ids[4] and ended[-2].finish_reason == pb.FINISH_REASON_STOP


def test_both_loopback_addresses(fake, moed_pb):
    pb, services = moed_pb
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no ::1 here")
    with grpc.insecure_channel(f"ipv6:[::1]:{fake.grpc_port}") as channel:
        assert list(services.InferenceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=5).names) == ["tiny"]
    assert requests.get(f"http://[::1]:{fake.http_port}/live", timeout=5).status_code == 200
