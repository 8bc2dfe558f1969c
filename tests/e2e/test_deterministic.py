"""--deterministic through the whole daemon: what else runs, and what is preempted for it, changes no bit of an answer."""

import concurrent.futures

import openai
import pytest
from conftest import DEMO, MOED, Daemon
from test_http_wire import metric

TOPICS = ["France", "Italy", "Spain", "Japan", "Germany", "Egypt", "Canada", "Norway",
          "water", "the sun", "bread", "music", "a cat", "rain", "iron", "the sea"]
NEW_TOKENS = 32
CONTEXT_TOKENS = 256
KV_BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 2  # layers, K and V, heads, head_dim, bf16
KV_TOKENS = 528  # two contexts; the requests below come to about 2000 tokens
assert 16 * (40 + NEW_TOKENS) > 2 * KV_TOKENS > 2 * CONTEXT_TOKENS


@pytest.fixture(scope="module")
def crowded():
    """Little KV, so that running answers lose theirs; prompts run in bulk passes between answers, and wide enough ones that
    without --deterministic other kernels would compute them."""
    daemon = Daemon(MOED, DEMO, "--deterministic", "--kv-gib", f"{KV_TOKENS * KV_BYTES_PER_TOKEN / 2**30:.6f}",
                    "--max-model-len", str(CONTEXT_TOKENS), "--pass-rows-max", "128", "--bulk-rows-min", "16",
                    ready_seconds=300)
    yield daemon
    assert daemon.stop() == 0, daemon.log


def requests_of():
    """(streamed, options): greedy and sampled, one choice and two, prompts of one to about 100 words."""
    for index, topic in enumerate(TOPICS):
        options = {"messages": [{"role": "user", "content": f"Tell me about {topic}." + " Be kind." * (index * 2)}],
                   "max_tokens": NEW_TOKENS, "logprobs": True, "top_logprobs": 5, "seed": index,
                   "temperature": 0 if index % 3 == 0 else 1.0, "n": 2 if index % 5 == 1 else 1}
        yield index % 2 == 0, options


def ask(client, request):
    """[(finish reason, text, [(token, bytes, logprob, top logprobs)])] by choice."""
    streamed, options = request
    answer = client.chat.completions.create(model="", stream=streamed, **options)
    count = options["n"]
    reasons, texts, steps = [None] * count, [""] * count, [[] for _ in range(count)]
    for part in answer if streamed else [answer]:
        for choice in part.choices:
            message = choice.delta if streamed else choice.message
            texts[choice.index] += message.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            for entry in choice.logprobs.content or [] if choice.logprobs else []:
                steps[choice.index].append((entry.token, entry.bytes, entry.logprob,
                                            [(top.token, top.bytes, top.logprob) for top in entry.top_logprobs]))
    return list(zip(reasons, texts, steps))


def test_sixteen_at_once_equal_alone_to_the_bit(crowded):
    requests = list(requests_of())
    with openai.OpenAI(base_url=crowded.url + "/v1", api_key="none", max_retries=0, timeout=300) as client:
        alone = [ask(client, request) for request in requests]
        assert metric(crowded, "vllm:num_preemptions_total") == 0
        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            together = list(pool.map(lambda request: ask(client, request), requests))
    assert metric(crowded, "vllm:num_preemptions_total") > 0, "nothing was preempted: the test is too easy"
    num_tokens = 0
    for (_, options), one, other in zip(requests, alone, together):
        assert len(one) == options["n"]
        assert other == one, options
        for reason, _, steps in one:
            assert reason == ("length" if len(steps) == NEW_TOKENS else "stop")
            num_tokens += len(steps)
    assert num_tokens >= 400
