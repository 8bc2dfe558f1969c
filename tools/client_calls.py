#!/usr/bin/env python3
"""One use of a client library as its documentation has it. usage: client_calls.py openai|langchain URL, or grpc TARGET.
Run by tools/check_clients.sh with the interpreter that has the library; prints what came and fails when it is not right."""

import sys

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


def openai(url):
    import openai as library

    client = library.OpenAI(base_url=url + "/v1", api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=16)
    print(f"chat: {chat.choices[0].message.content!r} {chat.choices[0].finish_reason} {chat.usage.total_tokens} tokens")
    assert chat.choices[0].message.content == ANSWER and chat.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=16, stream=True,
                                            stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    print(f"stream: {text!r} in {len(chunks)} chunks, usage {chunks[-1].usage.completion_tokens} tokens")
    assert text == ANSWER and chunks[-1].usage.total_tokens == chat.usage.total_tokens
    scored = client.completions.create(model=model, prompt="The capital of France is", max_tokens=1, temperature=0, logprobs=2)
    print(f"completion: {scored.choices[0].text!r} {scored.choices[0].logprobs.top_logprobs[0]}")
    assert len(scored.choices[0].logprobs.tokens) == 1
    try:
        client.chat.completions.create(model="other", messages=messages)
        raise SystemExit("another model was served")
    except library.NotFoundError as error:
        print(f"another model: {type(error).__name__} {error.code}")


def langchain(url):
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=url + "/v1", api_key="none", model="demo", temperature=0, max_tokens=16)
    answer = model.invoke(QUESTION)
    print(f"invoke: {answer.content!r} {answer.usage_metadata}")
    assert answer.content == ANSWER and answer.usage_metadata["output_tokens"] > 0
    text = "".join(chunk.content for chunk in model.stream(QUESTION))
    print(f"stream: {text!r}")
    assert text == ANSWER
    answers = model.batch([[SystemMessage("You are brief."), HumanMessage(QUESTION)], QUESTION])
    print(f"batch: {[one.content for one in answers]}")
    assert len(answers) == 2 and answers[1].content == ANSWER
    scored = model.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    first = scored.response_metadata["logprobs"]["content"][0]
    print(f"logprobs: {first['token']!r} {first['logprob']:.3f}, best {[top['token'] for top in first['top_logprobs']]}")
    assert len(first["top_logprobs"]) == 2


def grpc(target):
    import grpc as library
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message_factory import GetMessageClass
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with library.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="moed.v1.Inference"))
        print(f"health: {health_pb2.HealthCheckResponse.ServingStatus.Name(health.status)}")
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        reflection = ProtoReflectionDescriptorDatabase(channel)
        print(f"services: {' '.join(sorted(reflection.get_services()))}")
        # No stubs: the messages come from the server's reflection.
        pool = DescriptorPool(reflection)
        service = pool.FindServiceByName("moed.v1.Inference")
        request_type = GetMessageClass(pool.FindMessageTypeByName("moed.v1.ChatCompletionRequest"))
        request = request_type(messages=[{"role": "user", "content": QUESTION}],
                               sampling={"temperature": 0, "max_tokens": 16})

        def answer_type(name):
            return GetMessageClass(service.methods_by_name[name].output_type)

        call = channel.unary_unary("/moed.v1.Inference/ChatCompletion", request_type.SerializeToString,
                                   answer_type("ChatCompletion").FromString)
        answer = call(request, timeout=120)
        print(f"ChatCompletion: {answer.choices[0].message.content!r} {answer.usage.completion_tokens} tokens")
        assert answer.choices[0].message.content == ANSWER
        stream = channel.unary_stream("/moed.v1.Inference/StreamChatCompletion", request_type.SerializeToString,
                                      answer_type("StreamChatCompletion").FromString)
        text = "".join(chunk.choice.content for chunk in stream(request, timeout=120))
        print(f"StreamChatCompletion: {text!r}")
        assert text == ANSWER


if __name__ == "__main__":
    {"openai": openai, "langchain": langchain, "grpc": grpc}[sys.argv[1]](sys.argv[2])
