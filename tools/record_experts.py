#!/usr/bin/env python3
"""Records which experts transformers' router chooses while the demo model answers greedily, for cache_bench.

A line for each layer of each token: the layer, then its experts; prompts are left out. To run it: the environment of
tools/make_goldens.py, and tools/make_demo.py --out models/demo before.

  tools/record_experts.py OUT.txt [NEW_TOKENS] && build/release/tests/offload/cache_bench OUT.txt 8
"""

import pathlib
import sys

import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEMO = ROOT / 'models' / 'demo'
QUESTIONS = [
    'Explain how a bicycle stays upright.',
    'Write a short story about a lighthouse.',
    'List ten animals and where they live.',
    'How does a computer add two numbers?',
]


def main():
    out, new_tokens = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    top_k = model.config.num_experts_per_tok
    lines = []
    with torch.inference_mode():
        for question in QUESTIONS:
            chat = [{'role': 'user', 'content': question}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', return_dict=False)
            cache = transformers.DynamicCache()
            for step in range(new_tokens):
                answer = model(ids, past_key_values=cache, use_cache=True, output_router_logits=step > 0)
                if step > 0:
                    for layer, logits in enumerate(answer.router_logits):
                        chosen = sorted(logits[-1].topk(top_k).indices.tolist())
                        lines.append(' '.join(map(str, [layer, *chosen])))
                ids = answer.logits[:, -1:].argmax(-1)
                if ids.item() == model.generation_config.eos_token_id:
                    break
    pathlib.Path(out).write_text('\n'.join(lines) + '\n')
    print(f'{len(lines)} lines')


if __name__ == '__main__':
    main()
