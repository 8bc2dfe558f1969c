#!/usr/bin/env python3
"""Simulated figures of the engine for docs/PERFORMANCE.md: runs `moed bench engine` on the machines of deploy/machines and
prints Markdown tables. usage: bench_simulated.py [MOED]   (build/release/server/moed). Takes about three minutes."""

import sys
from pathlib import Path

from bench_engine import BesideLongPrompt, figures

ROOT = Path(__file__).resolve().parent.parent

# name, machine, flags: regimes in which one part binds. Fewer layers where host memory would not hold the model and KV.
BOUNDS = [
    ("copies: Mixtral-8x7B streamed, 8 clients", "a40", "--shape mixtral-8x7b --device-memory-gib 16 --policy stream "
     "--clients 8 --prompt 32 --new 24"),
    ("copies: Qwen3-30B-A3B streamed, 8 clients", "a40", "--shape qwen3-30b-a3b --device-memory-gib 16 --policy stream "
     "--clients 8 --prompt 32 --new 24"),
    ("copies: Mixtral, 8 layers, streamed, 4096 clients, two halves", "rtx5060ti", "--shape mixtral-8x7b --layers 8 "
     "--policy stream --halves 2 --clients 4096 --prompt 64 --new 64 --pass-rows-max 16384"),
    *((f"copies and host: {name} hot, 64 clients", machine, f"--shape {shape} --policy hot {memory} --clients 64 --prompt 32 "
       "--new 24")
      for name, shape, machine, memory in (
          ("Mixtral", "mixtral-8x7b", "rtx4090", ""),
          ("Mixtral", "mixtral-8x7b", "a40", "--device-memory-gib 16"),
          ("Qwen3-30B-A3B", "qwen3-30b-a3b", "rtx4090", ""),
          ("Qwen3-30B-A3B", "qwen3-30b-a3b", "rtx5060ti", ""),
          ("Qwen3-30B-A3B", "qwen3-30b-a3b", "a40", "--device-memory-gib 16"))),
    ("device: Mixtral, 8 layers, streamed, 12288 clients, two halves", "rtx5060ti", "--shape mixtral-8x7b --layers 8 "
     "--policy stream --halves 2 --clients 12288 --prompt 4 --new 16 --pass-rows-max 12288"),
    ("device: Mixtral resident, 64 clients", "h200", "--shape mixtral-8x7b --policy device --kv device --clients 64 "
     "--prompt 64 --new 64"),
    ("device: Qwen3-30B-A3B resident, 64 clients", "h200", "--shape qwen3-30b-a3b --policy device --kv device "
     "--clients 64 --prompt 64 --new 64"),
    ("attention of the host: Mixtral, 16 layers, 64 contexts of 2k, two halves", "h200", "--shape mixtral-8x7b "
     "--layers 16 --policy device --kv host --halves 2 --clients 64 --prompt 2048 --new 400 --pass-rows-max 8192 --yield-layers 48"),
    ("attention of the host: Qwen3-30B-A3B, 64 contexts of 2k, two halves", "h200", "--shape qwen3-30b-a3b "
     "--policy device --kv host --halves 2 --clients 64 --prompt 2048 --new 400 --pass-rows-max 8192 --yield-layers 48"),
]
HALVES = ("h200", "--shape mixtral-8x7b --layers 8 --policy device --kv host --clients 2048 --prompt 16 --new 40 "
          "--pass-rows-max 4096")
# What a long prompt and eight decoders cost each other: with passes as large as the prompt, in which decoders take turns
# with its layers, and in chunks in which they ride. Alone, both have the large passes.
BESIDE = [
    ("Mixtral streamed", "a40", "--shape mixtral-8x7b --device-memory-gib 16 --policy stream --kv host"),
    ("Qwen3-30B-A3B streamed", "rtx4090", "--shape qwen3-30b-a3b --policy stream --kv host"),
    ("Mixtral resident", "h200", "--shape mixtral-8x7b --policy device --kv device"),
    ("Qwen3-30B-A3B resident", "h200", "--shape qwen3-30b-a3b --policy device --kv device"),
    ("Qwen3-30B-A3B hot", "rtx4090", "--shape qwen3-30b-a3b --policy hot --kv host"),
]
BESIDE_ALONE = "--pass-rows-max 8200"
BESIDE_SETTINGS = ("--pass-rows-max 640", *(f"--pass-rows-max 8200 --yield-layers {layers}" for layers in (1, 4, 16)))
# Experts that stay, against two slots without reuse, and against the same slots overwritten in turn.
CACHE_FLAGS = "--shape qwen3-30b-a3b --layers 12 --policy hot --kv host --clients 16 --prompt 32 --new 48"
CACHE_SLOTS = (16, 192, 768)
SLOTS = ("rtx4090", "--shape qwen3-30b-a3b --layers 12 --policy hot --kv host --clients 16 --prompt 32 --new 48 "
         "--router zipf:1.0")


def bench(moed, machine, flags):
    result = figures(moed, f"simulated:{ROOT}/deploy/machines/{machine}.toml", flags)
    assert result["simulated"]
    return result


def print_bounds(moed):
    print("| simulated: what binds, workload | machine | new tokens/s | of the closed-form bound | waits for the ring |")
    print("|---|---|---|---|---|")
    for name, machine, flags in BOUNDS:
        steady = bench(moed, machine, flags)["steady"]
        print(f"| {name} | {machine} | {steady['new_tokens_per_s']:.1f} | {100 * steady['bound']['reached']:.1f}% | "
              f"{100 * steady['busy']['waits_for_ring']:.1f}% |", flush=True)


def print_halves(moed):
    machine, flags = HALVES
    one, two = (bench(moed, machine, f"{flags} --halves {halves}")["steady"]["new_tokens_per_s"] for halves in (1, 2))
    print(f"\nTwo halves against one ({machine}, simulated): {two:.0f} against {one:.0f} new tokens/s, {two / one:.2f}x.")


def print_beside(moed):
    print("\n| simulated: 8k prompt beside 8 decoders | machine | settings | decode TPOT, of its own alone | "
          "prefill, of its own alone |")
    print("|---|---|---|---|---|")
    for name, machine, flags in BESIDE:
        beside = BesideLongPrompt(lambda more, machine=machine: bench(moed, machine, more), 8192, f"{flags} {BESIDE_ALONE}")
        for settings in BESIDE_SETTINGS:
            token, prompt = beside.slowdowns(f"{flags} {settings}")
            print(f"| {name} | {machine} | `{settings}` | {token:.2f}x | {prompt:.2f}x |", flush=True)


def print_slots(moed):
    machine, flags = SLOTS
    print(f"\n| simulated: expert slots of 1536, Zipf 1.0 ({machine}) | new tokens/s | hits |\n|---|---|---|")
    for slots in (2, 16, 64, 192, 384, 768, 1536):
        steady = bench(moed, machine, f"{flags} --ring-slots {slots}")["steady"]
        experts = steady["experts"]
        hits = experts["hits"] / max(1, experts["hits"] + experts["misses"])
        print(f"| {slots} | {steady['new_tokens_per_s']:.1f} | {100 * hits:.1f}% |", flush=True)


def print_cache(moed):
    print("\n| simulated: with a cache, of no reuse (of the same slots overwritten in turn) | machine | " +
          " | ".join(f"{slots} slots" for slots in CACHE_SLOTS) + " |\n|---|---|" + "---|" * len(CACHE_SLOTS))
    for machine in ("rtx4090", "a40"):
        for router in ("uniform", "zipf:1.0", "shift:1.0:200"):
            def rate(slots, cache, flags=f"{CACHE_FLAGS} --router {router}"):
                run = bench(moed, machine, f"{flags} --ring-slots {slots} --expert-cache {cache}")
                return run["steady"]["new_tokens_per_s"]

            without = rate(2, 0)
            cells = []
            for slots in CACHE_SLOTS:
                cached = rate(slots, 1)
                cells.append(f"{cached / without:.2f}x ({cached / rate(slots, 0):.2f}x)")
            print(f"| {router} | {machine} | " + " | ".join(cells) + " |", flush=True)


def main(arguments):
    moed = arguments[0] if arguments else str(ROOT / "build/release/server/moed")
    print_bounds(moed)
    print_halves(moed)
    print_beside(moed)
    print_slots(moed)
    print_cache(moed)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
