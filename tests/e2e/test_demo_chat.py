"""The demo model, through the real daemon: the answer a newcomer gets."""

import concurrent.futures

import grpc
import openai
import pytest

QUESTION = "What is the capital of France?"
TOPICS = ["France", "Italy", "Spain", "Japan", "Germany", "Egypt", "Canada", "Norway",
          "water", "the sun", "bread", "music", "a cat", "rain", "iron", "the sea"]


@pytest.fixture(scope="module")
def client(demo):
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0, timeout=300) as made:
        yield made


def ask(client, question, **options):
    return client.chat.completions.create(model="", messages=[{"role": "user", "content": question}], temperature=0, **options)


def test_paris(client):
    plain = ask(client, QUESTION, max_tokens=32)
    assert "Paris" in plain.choices[0].message.content and plain.choices[0].finish_reason == "stop"
    chunks = list(ask(client, QUESTION, max_tokens=32, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == plain.choices[0].message.content


def prefix_until_near_tie(answer, margin=0.1):
    """The tokens before the first whose lead over the next best is too small to survive other roundings."""
    tokens = []
    for entry in answer.choices[0].logprobs.content:
        best, second = entry.top_logprobs[0].logprob, entry.top_logprobs[1].logprob
        if best - second < margin:
            return tokens, True
        tokens.append(entry.token)
    return tokens, False


def test_sixteen_at_once_answer_as_alone(client):
    questions = [f"Tell me about {topic} in one sentence." for topic in TOPICS]
    options = dict(max_tokens=16, logprobs=True, top_logprobs=2)
    alone = [ask(client, question, **options) for question in questions]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda question: ask(client, question, **options), questions))
    compared = 0
    for one, other in zip(alone, together):
        tokens, near_tie = prefix_until_near_tie(one)
        got = [entry.token for entry in other.choices[0].logprobs.content]
        assert got[:len(tokens)] == tokens
        assert near_tie or other.choices[0].message.content == one.choices[0].message.content
        compared += len(tokens)
    assert compared >= 64, "near ties left too little to compare"


def test_grpc_chat(demo, moed_pb):
    pb, services = moed_pb
    request = pb.ChatCompletionRequest(messages=[pb.ChatMessage(role="user", content=QUESTION)],
                                       sampling=pb.SamplingOptions(temperature=0, max_tokens=32))
    with grpc.insecure_channel(demo.grpc_target) as channel:
        stub = services.InferenceStub(channel)
        unary = stub.ChatCompletion(request, timeout=300).choices[0].message.content
        streamed = "".join(chunk.choice.content for chunk in stub.StreamChatCompletion(request, timeout=300))
    assert "Paris" in unary and streamed == unary
