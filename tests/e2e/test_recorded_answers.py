"""The demo's answers against transformers' (tests/golden/demo_greedy.json); the noise-free variant and its oracle."""

import concurrent.futures
import json
import subprocess
import sys

import openai
import pytest
from conftest import MOED, ROOT, Daemon

RECORD = json.loads((ROOT / "tests/golden/demo_greedy.json").read_text())
ANSWERS = RECORD["answers"]
# The newcomer's question: transformers is unsure of "The", its answer is wanted all the same.
PARIS = "What is the capital of France?"


def client_of(daemon):
    return openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0, timeout=300)


def ask(client, prompt, **options):
    return client.chat.completions.create(model="", messages=[{"role": "user", "content": prompt}], temperature=0,
                                          max_tokens=RECORD["max_tokens"], **options)


def check(answer, recorded):
    """Text is equal as far as transformers was sure of it; to the end when it was sure of all, or when we insist."""
    assert answer.usage.prompt_tokens == len(recorded["prompt_tokens"])
    text, choice = recorded["text"], answer.choices[0]
    if recorded["compared"] == len(recorded["tokens"]) or recorded["prompt"] == PARIS:
        assert choice.message.content == text and choice.finish_reason == recorded["finish_reason"]
    else:
        assert choice.message.content.startswith(recorded["text_compared"])


@pytest.mark.parametrize("recorded", ANSWERS, ids=lambda recorded: recorded["prompt"])
def test_greedy_answer_equals_transformers(demo, recorded):
    with client_of(demo) as client:
        check(ask(client, recorded["prompt"]), recorded)


def test_all_at_once_equal_transformers(demo):
    with client_of(demo) as client, concurrent.futures.ThreadPoolExecutor(len(ANSWERS)) as pool:
        for answer, recorded in zip(pool.map(lambda recorded: ask(client, recorded["prompt"]), ANSWERS), ANSWERS):
            check(answer, recorded)


def sure_steps(recorded):
    """Steps whose margin rounding cannot turn and whose token is text of its own."""
    return [step for step, (margin, tolerance) in enumerate(zip(recorded["margin"], recorded["tolerance"]))
            if margin > tolerance and "\ufffd" not in recorded["token_texts"][step]]


@pytest.mark.parametrize("recorded", ANSWERS, ids=lambda recorded: recorded["prompt"])
def test_each_sure_step_equals_transformers(demo, recorded):
    """One token after each prefix of the recorded answer, so that an unsure step does not end the comparison."""
    steps = sure_steps(recorded)
    prompts = [recorded["prompt_tokens"] + recorded["tokens"][:step] for step in steps]
    with client_of(demo) as client:
        answer = client.completions.create(model="", prompt=prompts, max_tokens=1, temperature=0)
    found = [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]
    assert found == [recorded["token_texts"][step] for step in steps]


def test_the_record_is_worth_comparing():
    assert [recorded["text"] for recorded in ANSWERS if recorded["prompt"] == PARIS] == ["The capital of France is Paris."]
    compared = [recorded["compared"] for recorded in ANSWERS if recorded["prompt"] != PARIS]
    assert len(compared) >= 8 and min(compared) >= 4 and sum(compared) >= 150
    for recorded in ANSWERS:
        assert recorded["text"].startswith(recorded["text_compared"])
        assert recorded["compared"] == 0 or recorded["text_compared"]
        sure = [margin > tolerance for margin, tolerance in zip(recorded["margin"], recorded["tolerance"])]
        assert recorded["compared"] == [*sure, False].index(False)
    assert sum(len(sure_steps(recorded)) for recorded in ANSWERS) >= 280


def first_logprobs(daemon):
    """{token: logprob} of the 20 best first tokens after each recorded prompt."""
    found = []
    with client_of(daemon) as client:
        for recorded in ANSWERS:
            answer = client.completions.create(model="", prompt=recorded["prompt_tokens"], max_tokens=1, temperature=0,
                                               logprobs=20)
            found.append(answer.choices[0].logprobs.top_logprobs[0])
    return found


def test_noise_free_variant_equals_its_dense_llama(tmp_path):
    """Equal experts whose weights add up to 1 are one expert: what is left is rounding, below the recorded bound."""
    found = {}
    for variant in ("noise-free", "dense"):
        folder = tmp_path / variant
        subprocess.run([sys.executable, ROOT / "tools/make_demo.py", "--out", folder, "--" + variant], check=True)
        daemon = Daemon(MOED, folder, ready_seconds=300)
        try:
            found[variant] = first_logprobs(daemon)
        finally:
            daemon.stop()
        (folder / "model.safetensors").unlink()
    for recorded, moe, dense in zip(ANSWERS, found["noise-free"], found["dense"]):
        common = moe.keys() & dense.keys()
        assert len(common) >= 15, (moe, dense)
        shifts = [moe[token] - dense[token] for token in common]
        assert max(shifts) - min(shifts) <= recorded["first_gap_tolerance"], recorded["prompt"]
