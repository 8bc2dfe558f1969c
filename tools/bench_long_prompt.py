#!/usr/bin/env python3
"""A prompt of 6144 tokens beside eight decoders on this machine's CPU, the demo model: what each costs the other, over
scheduler.bulk_rows_min, yield_layers and pass_rows_max. Prints a Markdown table, medians over rounds that take every
setting in turn; each figure goes to stderr as it comes. About ten minutes a round on two slow cores; the machine should
be idle otherwise. usage: bench_long_prompt.py [MOED [ROUNDS]]   (build/release/server/moed, 3)"""

import statistics
import sys
from pathlib import Path

from bench_engine import BesideLongPrompt, figures

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 6144
FLAGS = f"--model {ROOT}/models/demo --kv-gib 1 --seed 1"
SETTINGS = [
    # Never bulk: chunks in which the decoders ride.
    *(f"--bulk-rows-min 8192 --pass-rows-max {rows}" for rows in (512, 2048)),
    # Bulk passes that yield.
    *(f"--bulk-rows-min 64 --pass-rows-max 512 --yield-layers {layers}" for layers in (1, 5, 30)),
    "--bulk-rows-min 64 --pass-rows-max 2048 --yield-layers 5",
]


def main(arguments):
    moed = arguments[0] if arguments else str(ROOT / "build/release/server/moed")
    rounds = int(arguments[1]) if len(arguments) > 1 else 3
    measured = {settings: [] for settings in SETTINGS}
    for _ in range(rounds):
        beside = BesideLongPrompt(lambda flags: figures(moed, "cpu", flags), TOKENS, FLAGS)
        for settings, pairs in measured.items():
            pairs.append(beside.slowdowns(f"{FLAGS} {settings}", new=400))
            print(f"{settings}: {pairs[-1][0]:.2f}x, {pairs[-1][1]:.2f}x", file=sys.stderr, flush=True)
    print(f"| {TOKENS} tokens beside 8 decoders, CPU | decode TPOT, of its own alone | prefill, of its own alone |\n|---|---|---|")
    for settings, pairs in measured.items():
        token, prompt = (statistics.median(values) for values in zip(*pairs))
        print(f"| `{settings}` | {token:.2f}x | {prompt:.2f}x |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
