"""The demo model, through the real daemon: the answer a newcomer gets."""

import concurrent.futures
import json

import grpc
import openai
import pytest
from conftest import ROOT

QUESTION = "What is the capital of France?"
# Their answers begin with many tokens that roundings cannot turn.
QUESTIONS = [QUESTION, "What is the capital of Japan?", "Name the days of the week.", "What is the speed of light?",
             "Who was the first president of the United States?", "What is the Great Wall of China?", "What is gravity?",
             "What is the chemical symbol for gold?", "What is the boiling point of water?", "What is the opposite of hot?",
             "What is the freezing point of water?", "What is the largest ocean on Earth?", "What is photosynthesis?",
             "What is the tallest mountain in the world?", "What is the smallest prime number?",
             "What is the longest river in the world?"]


@pytest.fixture(scope="module")
def client(demo):
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0, timeout=300) as made:
        yield made


def ask(client, question, **options):
    return client.chat.completions.create(model="", messages=[{"role": "user", "content": question}], temperature=0, **options)


def test_paris(client):
    plain = ask(client, QUESTION, max_tokens=32)
    assert plain.choices[0].message.content == "The capital of France is Paris."
    assert plain.choices[0].finish_reason == "stop"
    chunks = list(ask(client, QUESTION, max_tokens=32, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == plain.choices[0].message.content


def rounding_tolerance():
    """How far roundings may move the lead of one token over another: the largest of the bounds derived for the steps of
    tests/golden/demo_greedy.json (6 sigma each; tests/golden/README.md)."""
    record = json.loads((ROOT / "tests/golden/demo_greedy.json").read_text())
    return max(bound for answer in record["answers"] for bound in answer["tolerance"])


def prefix_until_near_tie(answer, margin):
    """The tokens before the first whose lead over the next best is too small to survive other roundings."""
    tokens = []
    for entry in answer.choices[0].logprobs.content:
        best, second = entry.top_logprobs[0].logprob, entry.top_logprobs[1].logprob
        if best - second < margin:
            return tokens, True
        tokens.append(entry.token)
    return tokens, False


def test_sixteen_at_once_answer_as_alone(client):
    """As far as roundings allow; test_deterministic.py asks for equality to the bit."""
    options = dict(max_tokens=16, logprobs=True, top_logprobs=2)
    alone = [ask(client, question, **options) for question in QUESTIONS]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda question: ask(client, question, **options), QUESTIONS))
    margin, compared = rounding_tolerance(), 0
    for one, other in zip(alone, together):
        tokens, near_tie = prefix_until_near_tie(one, margin)
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
