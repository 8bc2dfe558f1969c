#!/usr/bin/env python3
"""Draws a trace of `moed bench engine --trace FILE` as SVG: a row a lane, time to the right.
usage: trace_svg.py TRACE.json OUT.svg [--from-ms A] [--to-ms B] [--width PIXELS]"""

import argparse
import json
import sys
from html import escape

LANE_HEIGHT = 34
MARGIN_LEFT = 110
MARGIN_TOP = 46
LEGEND_HEIGHT = 30
# Names that have a colour of their own, in the order of the legend; what is left is grey.
COLOURS = {
    "copy": "#e69f00", "expert_ffn": "#0072b2", "attention": "#009e73", "linear": "#56b4e9", "rope_append": "#94c9a9",
    "route": "#cc79a7", "group": "#b58fa8", "combine": "#7f9fc4", "move": "#f0c674", "sample": "#d4a373", "rms_norm": "#b9c7d6",
    "embed": "#d5c4a1", "host code": "#d55e00", "wait": "#eeeeee",
}
GREY = "#999999"


def read_trace(path):
    """(description of the device, lane names by id, spans)"""
    with open(path, encoding="utf-8") as file:
        trace = json.load(file)
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    return trace.get("otherData", {}).get("device", ""), names, spans


def tick_ms(length_ms):
    """A round step that gives 5 to 12 ticks."""
    for power in range(-3, 9):
        for digit in (1, 2, 5):
            if length_ms <= 12 * digit * 10.0**power:
                return digit * 10.0**power
    return length_ms


def merged(spans, gap_us):
    """The spans of a lane in the order in which they are drawn; what is alike and too near to be told apart is one."""
    out = []
    # Waits first: what the host does while it waits lies on top.
    for span in sorted(spans, key=lambda span: (span["name"] != "wait", span["ts"])):
        end = span["ts"] + span["dur"]
        count = span["args"].get("bytes", 0)
        if out and out[-1]["name"] == span["name"] and span["ts"] - out[-1]["end"] < gap_us:
            out[-1]["end"] = max(out[-1]["end"], end)
            out[-1]["count"] += 1
            out[-1]["bytes"] += count
        else:
            out.append({"name": span["name"], "begin": span["ts"], "end": end, "count": 1, "bytes": count})
    return out


def draw(device, names, spans, begin_us, end_us, width):
    lanes = [lane for lane in sorted(names) if any(span["tid"] == lane for span in spans)]
    scale = (width - MARGIN_LEFT - 10) / (end_us - begin_us)
    height = MARGIN_TOP + LANE_HEIGHT * len(lanes) + LEGEND_HEIGHT + 24
    bottom = MARGIN_TOP + LANE_HEIGHT * len(lanes)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
           f'font-size="11"><rect width="{width}" height="{height}" fill="white"/>',
           f'<text x="10" y="18" font-size="13">{escape(device)}</text>']
    step_us = tick_ms((end_us - begin_us) / 1e3) * 1e3
    tick = 0
    while tick * step_us <= end_us - begin_us:
        x = MARGIN_LEFT + tick * step_us * scale
        out.append(f'<line x1="{x:.1f}" y1="{MARGIN_TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>'
                   f'<text x="{x:.1f}" y="{MARGIN_TOP - 9}" text-anchor="middle">{tick * step_us / 1e3:g} ms</text>')
        tick += 1
    used = []
    for row, lane in enumerate(lanes):
        y = MARGIN_TOP + row * LANE_HEIGHT
        out.append(f'<text x="{MARGIN_LEFT - 8}" y="{y + LANE_HEIGHT / 2 + 4}" text-anchor="end">{escape(names[lane])}</text>')
        for span in merged((span for span in spans if span["tid"] == lane), 1.0 / scale):
            left, right = max(span["begin"], begin_us), min(span["end"], end_us)
            if right <= left:
                continue
            x, w = MARGIN_LEFT + (left - begin_us) * scale, (right - left) * scale
            title = f'{span["name"]} {span["end"] - span["begin"]:.1f} us'
            title = f'{span["count"]} x {title}' if span["count"] > 1 else title
            title += f', {span["bytes"]} bytes' if span["bytes"] else ""
            out.append(f'<rect x="{x:.2f}" y="{y + 4}" width="{max(w, 0.3):.2f}" height="{LANE_HEIGHT - 8}" '
                       f'fill="{COLOURS.get(span["name"], GREY)}"><title>{escape(title)}</title></rect>')
            if span["name"] not in used:
                used.append(span["name"])
    x = MARGIN_LEFT
    for name in [*(name for name in COLOURS if name in used), *(name for name in used if name not in COLOURS)]:
        out.append(f'<rect x="{x}" y="{bottom + 14}" width="12" height="12" fill="{COLOURS.get(name, GREY)}"/>'
                   f'<text x="{x + 16}" y="{bottom + 24}">{escape(name)}</text>')
        x += 30 + 7 * len(name)
    return "\n".join(out) + "\n</svg>\n"


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("svg")
    parser.add_argument("--from-ms", type=float, default=None, help="since the trace began")
    parser.add_argument("--to-ms", type=float, default=None)
    parser.add_argument("--width", type=int, default=1200)
    options = parser.parse_args(arguments)
    device, names, spans = read_trace(options.trace)
    if not spans:
        print(f"trace_svg.py: {options.trace} holds no spans", file=sys.stderr)
        return 1
    begin_us = min(span["ts"] for span in spans) if options.from_ms is None else options.from_ms * 1e3
    end_us = max(span["ts"] + span["dur"] for span in spans) if options.to_ms is None else options.to_ms * 1e3
    if end_us <= begin_us or options.width < 300:
        print("trace_svg.py: needs --from-ms below --to-ms, and --width from 300", file=sys.stderr)
        return 1
    with open(options.svg, "w", encoding="utf-8") as file:
        file.write(draw(device, names, spans, begin_us, end_us, options.width))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
