"""Log-likelihoods of given texts, asked for as lm-eval does (echo, one token, logprobs 1), against transformers'
(tests/golden/demo_loglikelihoods.json). tools/check_clients.sh lm-eval has lm-eval itself ask."""

import concurrent.futures
import json

import pytest
import requests
from conftest import ROOT

RECORD = json.loads((ROOT / "tests/golden/demo_loglikelihoods.json").read_text())
ENTRIES = RECORD["entries"]
ANSWERS = json.loads((ROOT / "tests/golden/demo_greedy.json").read_text())["answers"]


def ask(daemon, **body):
    answer = requests.post(daemon.url + "/v1/completions", json={"temperature": 0, "logprobs": 1, "echo": True} | body,
                           timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def check(choice, entry):
    """The continuation's log-probabilities, their sum, and whether it is the best one."""
    end = len(entry["tokens"])
    found = choice["logprobs"]["token_logprobs"][entry["num_context"]:end]
    tops = choice["logprobs"]["top_logprobs"][entry["num_context"]:end]
    assert len(choice["logprobs"]["token_logprobs"]) == end + 1 and choice["logprobs"]["token_logprobs"][0] is None
    for value, expected in zip(found, entry["logprobs"], strict=True):
        assert abs(value - expected) <= entry["tolerance"]
    assert abs(sum(found) - sum(entry["logprobs"])) <= entry["sum_tolerance"]
    if entry["greedy"] is not None:
        assert all(value == max(top.values()) for value, top in zip(found, tops, strict=True)) == entry["greedy"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry['item']}-{entry['choice']}")
def test_a_continuation_scores_as_in_transformers(demo, entry):
    check(ask(demo, prompt=entry["tokens"], max_tokens=1)[0], entry)


@pytest.mark.parametrize("recorded", ANSWERS, ids=lambda recorded: recorded["prompt"])
def test_a_greedy_answer_is_the_best_one(demo, recorded):
    """Where transformers is sure of a step, the token has the greatest log-probability, as lm-eval looks for it."""
    tokens = recorded["prompt_tokens"] + recorded["tokens"]
    scores = ask(demo, prompt=tokens, max_tokens=1)[0]["logprobs"]
    sure = [step for step, (margin, bound) in enumerate(zip(recorded["margin"], recorded["tolerance"])) if margin > bound]
    assert len(sure) >= 4
    for step in sure:
        position = len(recorded["prompt_tokens"]) + step
        assert scores["token_logprobs"][position] == max(scores["top_logprobs"][position].values()), step


def test_texts_score_as_their_tokens(demo):
    """lm-eval may send texts; asked for together and each choice in its place."""
    found = ask(demo, prompt=[entry["context"] + entry["continuation"] for entry in ENTRIES], max_tokens=1)
    for choice, entry in zip(found, ENTRIES, strict=True):
        check(choice, entry)


def test_many_at_once_score_the_same(demo):
    with concurrent.futures.ThreadPoolExecutor(len(ENTRIES)) as pool:
        answers = pool.map(lambda entry: ask(demo, prompt=entry["tokens"], max_tokens=1)[0], ENTRIES)
        for choice, entry in zip(answers, ENTRIES, strict=True):
            check(choice, entry)


def test_the_record_fits_the_task_and_tells_answers_apart():
    facts = [json.loads(line) for line in (ROOT / "tests/e2e/lm_eval/facts.jsonl").read_text().splitlines()]
    wanted = [(item, choice, f"Question: {fact['question']}\nAnswer:", " " + text)
              for item, fact in enumerate(facts) for choice, text in enumerate(fact["choices"])]
    assert [(one["item"], one["choice"], one["context"], one["continuation"]) for one in ENTRIES] == wanted
    # A bound that any answer would meet shows nothing.
    for item in range(len(facts)):
        sums = [sum(entry["logprobs"]) for entry in ENTRIES if entry["item"] == item]
        bound = max(entry["sum_tolerance"] for entry in ENTRIES if entry["item"] == item)
        assert bound < 1 and max(sums) - min(sums) > 4 * bound
