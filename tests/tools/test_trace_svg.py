"""tools/trace_svg.py draws what a trace holds."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools/trace_svg.py"
SVG = "{http://www.w3.org/2000/svg}"


def span(lane, name, begin_us, us, size=0):
    return {"name": name, "ph": "X", "pid": 1, "tid": lane, "ts": begin_us, "dur": us, "args": {"bytes": size}}


def draw(tmp_path, events, *flags):
    names = [{"name": "thread_name", "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}}
             for lane, name in enumerate(["host 0", "stream 1", "copies 2"])]
    trace, svg = tmp_path / "t.json", tmp_path / "t.svg"
    trace.write_text(json.dumps({"otherData": {"device": "simulated: <box>"}, "traceEvents": names + events}))
    done = subprocess.run([sys.executable, TOOL, trace, svg, *flags], capture_output=True, text=True, check=False)
    return done, svg


def bars(svg):
    """[(title, x, width)] of all spans."""
    root = ElementTree.parse(svg).getroot()
    return [(rect.find(SVG + "title").text, float(rect.get("x")), float(rect.get("width")))
            for rect in root.iter(SVG + "rect") if rect.find(SVG + "title") is not None]


def test_places_and_lengths(tmp_path):
    done, svg = draw(tmp_path, [span(0, "wait", 0, 1000), span(1, "linear", 250, 500), span(2, "copy", 0, 250, 77)],
                     "--width", "1120")
    assert done.returncode == 0, done.stderr
    # 1000 us are 1000 pixels from 110 on.
    assert sorted(bars(svg)) == [("copy 250.0 us, 77 bytes", 110.0, 250.0), ("linear 500.0 us", 360.0, 500.0),
                                 ("wait 1000.0 us", 110.0, 1000.0)]
    text = "".join(ElementTree.parse(svg).getroot().itertext())
    assert "simulated: <box>" in text and "copies 2" in text


def test_a_window_cuts(tmp_path):
    done, svg = draw(tmp_path, [span(1, "linear", 0, 10_000), span(1, "move", 20_000, 5)], "--from-ms", "5", "--to-ms",
                     "15", "--width", "1120")
    assert done.returncode == 0, done.stderr
    assert bars(svg) == [("linear 10000.0 us", 110.0, 500.0)]


def test_what_cannot_be_told_apart_is_one(tmp_path):
    packets = [span(2, "copy", at, 9.9, 5) for at in range(0, 100_000, 10)]
    done, svg = draw(tmp_path, packets)
    assert done.returncode == 0, done.stderr
    [(title, _, _)] = bars(svg)
    assert title.startswith("10000 x copy") and title.endswith("50000 bytes")


def test_refusals(tmp_path):
    done, _ = draw(tmp_path, [])
    assert done.returncode == 1 and "no spans" in done.stderr
    done, _ = draw(tmp_path, [span(1, "linear", 0, 10)], "--from-ms", "2", "--to-ms", "1")
    assert done.returncode == 1 and "--from-ms" in done.stderr
