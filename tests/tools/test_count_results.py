"""A failure anywhere must reach the last line and the exit code, also when a part left no report at all."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/count_results.py"
GOOD = '<testsuites><testsuite><testcase classname="a" name="x" status="run"/><testcase name="y"><skipped/></testcase></testsuite></testsuites>'
BAD = '<testsuite><testcase classname="a" name="x" status="fail"><failure/></testcase></testsuite>'
EMPTY = "<testsuite></testsuite>"


def run(folder, lint="lint a: passed\n", ctest=GOOD, e2e=GOOD, codes=(0, 0), cuda=None):
    for name, text in (("lint.txt", lint), ("ctest.xml", ctest), ("e2e.xml", e2e), ("cuda.txt", cuda)):
        if text is not None:
            (folder / name).write_text(text)
    parts = ("ctest", "e2e", "cuda")[:len(codes)]
    done = subprocess.run([sys.executable, TOOL, folder, *(f"{part}={code}" for part, code in zip(parts, codes))],
                          text=True, stdout=subprocess.PIPE)
    return done.returncode, done.stdout.splitlines()[-1]


def test_all_good(tmp_path):
    assert run(tmp_path) == (0, "3 passed, 0 failed")


def test_cuda_counts_where_it_was_asked_for(tmp_path):
    assert run(tmp_path, codes=(0, 0, 0), cuda="cuda build: passed\n") == (0, "4 passed, 0 failed")


@pytest.mark.parametrize("change, last", [
    ({"cuda": "cuda build: failed\n", "codes": (0, 0, 1)}, "3 passed, 1 failed"),
    ({"cuda": "cuda build: passed\n", "codes": (0, 0, 1)}, "4 passed, 1 failed"),
    ({"codes": (0, 0, 1)}, "3 passed, 1 failed"),
    ({"codes": (0, 0, 0)}, "3 passed, 1 failed"),
    ({"lint": "lint a: passed\nlint b: failed\n"}, "3 passed, 1 failed"),
    ({"lint": None}, "2 passed, 1 failed"),
    ({"ctest": BAD, "codes": (8, 0)}, "2 passed, 1 failed"),
    ({"ctest": BAD}, "2 passed, 1 failed"),
    ({"ctest": None, "codes": (8, 0)}, "2 passed, 1 failed"),
    ({"ctest": EMPTY}, "2 passed, 1 failed"),
    ({"e2e": BAD, "codes": (0, 1)}, "2 passed, 1 failed"),
    ({"e2e": GOOD, "codes": (0, 2)}, "3 passed, 1 failed"),
    ({"e2e": None}, "2 passed, 1 failed"),
])
def test_every_kind_of_failure_counts(tmp_path, change, last):
    assert run(tmp_path, **change) == (1, last)
