#!/usr/bin/env python3
"""Records transformers' greedy answers of the demo model (fp32 on its bf16 weights) into tests/golden/demo_greedy.json.

For each step it also keeps how sure the choice is against bf16 rounding, derived as tests/golden/README.md says:
`margin` is the gap between the chosen token's logit and the most dangerous rival's, `tolerance` the bound of that gap's
error. A greedy engine must give the same tokens up to `compared`, the first step whose margin is below its tolerance,
and after any prefix of the recorded tokens the same next one wherever the margin is above.
To run it: the environment of tools/make_goldens.py, and tools/make_demo.py --out models/demo before.
"""

import json
import pathlib
import sys

import torch
import transformers
from make_goldens import PINNED, ROUNDOFF, SIGMAS, Reference, Shape
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / 'tests' / 'golden' / 'demo_greedy.json'
NEW_TOKENS, DRAWS, RIVALS = 48, 8, 50
PROMPTS = [  # the first for its text; the others because transformers is sure of many first steps
    'What is the capital of France?',
    'What is the capital of Germany?',
    'What is the capital of Japan?',
    'Name the days of the week.',
    'Who was the first president of the United States?',
    'What is the speed of light?',
    'What is gravity?',
    'What is the chemical symbol for gold?',
    'What is the Great Wall of China?',
    'What is the freezing point of water?',
]


class SparseReference(Reference):
    """Computes only the chosen experts: the demo is too large for all of them."""

    def moe(self, x, prefix, routers):
        logits = self.linear(x, prefix + '.gate')
        routers.append(logits)
        scores, chosen = logits.softmax(-1).topk(self.shape.top_k, -1)
        scores = scores / scores.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for expert in range(self.shape.experts):
            rows, choices = (chosen[0] == expert).nonzero(as_tuple=True)
            part = self.mlp(x[0, rows], f'{prefix}.experts.{expert}', self.shape.parts)
            y[0, rows] += scores[0, rows, choices, None] * part
        return y


def sure_steps(reference, sequence, prompt_tokens):
    """[tokens] margin, tolerance and best token of each step; the largest tolerance of the first step's gaps."""
    inputs = sequence[None, :-1]
    exact = reference(inputs)[0][0, prompt_tokens - 1:]
    chosen = sequence[prompt_tokens:, None]
    rivals = exact.topk(RIVALS, -1).indices
    gaps = exact.gather(-1, chosen) - exact.gather(-1, rivals)
    squares = torch.zeros_like(gaps)
    noise = torch.Generator().manual_seed(1)
    for _ in range(DRAWS):
        logits = reference(inputs, noise)[0][0, prompt_tokens - 1:]
        squares += (logits.gather(-1, chosen) - logits.gather(-1, rivals) - gaps).pow(2)
    tolerances = SIGMAS * (squares / DRAWS).sqrt()
    # The chosen token is among the rivals, with gap and tolerance 0: the least sure of the others counts.
    doubt = torch.where(rivals == chosen, torch.inf, gaps / tolerances.clamp(min=1e-9))
    worst = doubt.argmin(-1, keepdim=True)
    margin, tolerance = (values.gather(-1, worst)[:, 0] for values in (gaps, tolerances))
    return margin, tolerance, exact.argmax(-1), tolerances[0].max().item()


def load_demo():
    """(tokenizer, transformers' model, reference) of the folder in the command line, else of models/demo."""
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / 'models' / 'demo'
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = SparseReference(Shape({'config': json.loads((folder / 'config.json').read_text())}),
                                load_file(folder / 'model.safetensors'), model.model.rotary_emb)
    return tokenizer, model, reference


def main():
    tokenizer, model, reference = load_demo()
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer.apply_chat_template([{'role': 'user', 'content': prompt}], add_generation_prompt=True,
                                               return_tensors='pt', return_dict=True)
        length = inputs['input_ids'].shape[1]
        sequence = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        margins, tolerances, argmax, first = sure_steps(reference, sequence, length)
        sure = (margins > tolerances).int().cumprod(0).sum().item()
        if not torch.equal(argmax[:sure], sequence[length:length + sure]):
            raise SystemExit(f'{prompt}: the reference and transformers choose differently')
        tokens = sequence[length:].tolist()
        stopped = tokens[-1] == model.generation_config.eos_token_id
        answers.append({
            'prompt': prompt, 'prompt_tokens': sequence[:length].tolist(), 'tokens': tokens,
            'token_texts': [tokenizer.decode([token], skip_special_tokens=True) for token in tokens],
            'text': tokenizer.decode(tokens, skip_special_tokens=True),
            'finish_reason': 'stop' if stopped else 'length',
            'margin': [round(m, 4) for m in margins.tolist()], 'tolerance': [round(t, 4) for t in tolerances.tolist()],
            'first_gap_tolerance': round(first, 4), 'compared': sure,
            'text_compared': tokenizer.decode(tokens[:sure], skip_special_tokens=True).rstrip('\ufffd')})
        print(f'{(margins > tolerances).sum()} of {len(tokens)} steps sure, the first {sure} in a row: {prompt} -> '
              f'{answers[-1]["text"]!r}', flush=True)
    record = {**PINNED, 'dtype': 'float32', 'roundoff': ROUNDOFF, 'sigmas': SIGMAS, 'max_tokens': NEW_TOKENS}
    lines = ',\n'.join(json.dumps(answer, ensure_ascii=False) for answer in answers)
    OUT.write_text(json.dumps(record)[:-1] + ', "answers": [\n' + lines + '\n]}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
