#!/usr/bin/env python3
"""Records transformers' log-likelihoods (fp32 on the demo's bf16 weights) of the answers of tests/e2e/lm_eval/facts.jsonl
into tests/golden/demo_loglikelihoods.json: what lm-eval computes for the task moed_facts.

Each entry is a pair of context and continuation, cut into tokens as lm-eval does it: the continuation's are those of the
whole text after as many as the context alone has. `logprobs` are its tokens', `tolerance` bounds the error of each that
bf16 rounding may cause and `sum_tolerance` that of their sum, derived as tests/golden/README.md says. `greedy` is whether
each token is the best one, null where rounding may turn it.
To run it: the environment of tools/make_goldens.py, and tools/make_demo.py --out models/demo before.
"""

import json
import pathlib

import torch
from make_goldens import PINNED, ROUNDOFF, SIGMAS
from record_demo import DRAWS, load_demo

ROOT = pathlib.Path(__file__).resolve().parent.parent
FACTS = ROOT / 'tests' / 'e2e' / 'lm_eval' / 'facts.jsonl'
OUT = ROOT / 'tests' / 'golden' / 'demo_loglikelihoods.json'


def pairs():
    """(item, choice, context, continuation) as moed_facts.yaml makes them."""
    for item, line in enumerate(FACTS.read_text(encoding='utf-8').splitlines()):
        fact = json.loads(line)
        for choice, text in enumerate(fact['choices']):
            yield item, choice, f'Question: {fact["question"]}\nAnswer:', ' ' + text


def scores(logits, targets):
    """[targets] log-probability of each, and by how much its logit beats the best other one."""
    chosen = logits.gather(-1, targets)[:, 0]
    others = logits.scatter(-1, targets, -torch.inf).amax(-1)
    return logits.log_softmax(-1).gather(-1, targets)[:, 0], chosen - others


def entry(model, reference, tokens, num_context):
    inputs, targets = tokens[None, :-1], tokens[num_context:, None]
    logprobs, leads = scores(model(inputs).logits[0, num_context - 1:], targets)
    exact, exact_leads = scores(reference(inputs)[0][0, num_context - 1:], targets)
    if (exact - logprobs).abs().max() > 1e-3:
        raise SystemExit('the reference and transformers differ')
    noise = torch.Generator().manual_seed(1)
    noisy = [scores(reference(inputs, noise)[0][0, num_context - 1:], targets) for _ in range(DRAWS)]
    errors = torch.stack([drawn - exact for drawn, _ in noisy])
    lead_errors = torch.stack([lead - exact_leads for _, lead in noisy])
    tolerance = SIGMAS * errors.pow(2).mean(0).sqrt().max().item()
    lead_tolerance = SIGMAS * lead_errors.pow(2).mean(0).sqrt().max().item()
    greedy = True if leads.min() > lead_tolerance else False if leads.min() < -lead_tolerance else None
    total = SIGMAS * errors.sum(-1).pow(2).mean().sqrt().item()
    return {'logprobs': [round(value, 4) for value in logprobs.tolist()], 'tolerance': round(tolerance, 4),
            'sum_tolerance': round(max(total, tolerance), 4), 'greedy': greedy}


def main():
    tokenizer, model, reference = load_demo()
    entries = []
    for item, choice, context, continuation in pairs():
        tokens = tokenizer(context + continuation, add_special_tokens=False, return_tensors='pt')['input_ids'][0]
        num_context = len(tokenizer(context, add_special_tokens=False)['input_ids'])
        found = entry(model, reference, tokens, num_context)
        entries.append({'item': item, 'choice': choice, 'context': context, 'continuation': continuation,
                        'tokens': tokens.tolist(), 'num_context': num_context, **found})
        print(f'{sum(found["logprobs"]):9.4f} +- {found["sum_tolerance"]:.4f}{continuation}', flush=True)
    record = {**PINNED, 'dtype': 'float32', 'roundoff': ROUNDOFF, 'sigmas': SIGMAS}
    lines = ',\n'.join(json.dumps(one, ensure_ascii=False) for one in entries)
    OUT.write_text(json.dumps(record)[:-1] + ', "entries": [\n' + lines + '\n]}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
