"""The gRPC door as the official Python packages meet it, over the fake engine."""

import time

import grpc
import pytest
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
