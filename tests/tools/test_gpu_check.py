"""tools/gpu_check.sh around its steps: what it deletes, what it skips, which architecture it builds for. cmake is the
test's, so nothing is built and the steps after it fail."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def check(tmp_path):
    """check(*arguments, **environment): (exit code, {step: result}, what cmake was told)."""
    root = tmp_path / "moed-gpu"
    (root / "third_party").mkdir(parents=True)
    (root / "tools").mkdir()
    (root / "VERSION").write_text("test\n")
    shutil.copy(ROOT / "tools/gpu_check.sh", root / "tools")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "cmake": f'echo "$@" >>{tmp_path}/cmake.txt',
        "nvcc": "echo nvcc",
        "nvidia-smi": 'case "$2" in 0) echo 9.0 ;; 1) echo 8.6 ;; GPU-7) echo 12.0 ;; *) echo No devices were found ;; esac',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)

    def run(*arguments, **environment):
        (tmp_path / "cmake.txt").unlink(missing_ok=True)
        env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        done = subprocess.run([root / "tools/gpu_check.sh", "--out", tmp_path / "out", "--work", tmp_path / "work", *arguments],
                              env=env | {"PATH": f"{programs}:{os.environ['PATH']}"} | environment, cwd=tmp_path,
                              capture_output=True, text=True, check=False, timeout=60)
        steps = tmp_path / "out/steps.txt"
        results = dict(line.split()[:2] for line in steps.read_text().splitlines()) if steps.exists() else {}
        told = tmp_path / "cmake.txt"
        return done.returncode, results, told.read_text() if told.exists() else ""

    return run


def test_it_deletes_only_what_is_its_own(check, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    own = ["report.txt", "probe.json", "ops.log", "bench-tiny.json"]
    others = ["thesis.txt", "bench-of-mine.json", "notes.log"]
    for name in own + others:
        (out / name).write_text("old")
    code, results, _ = check("--device", "emulated")
    assert code != 0 and results["configure"] == "passed" and results["ops"] == "failed"
    assert all((out / name).read_text() == "old" for name in others)
    assert not (out / "probe.json").exists() and not (out / "bench-tiny.json").exists()
    assert (out / "ops.log").read_text() != "old"


def test_the_report_says_how_steps_ended_though_nothing_was_built(check, tmp_path):
    check("--device", "emulated")
    text = (tmp_path / "out/report.txt").read_text()
    assert "Of ops.log" in text and "No such file" in text
    assert text.splitlines()[-1] == "2 passed, 7 failed"


def test_a_suite_that_dies_is_run_test_by_test(check, tmp_path):
    suite = tmp_path / "moed-gpu/build/tests/gpu/gpu_ops_test"
    suite.parent.mkdir(parents=True)
    suite.write_text("""#!/bin/bash
case "$*${GTEST_SHARD_INDEX:-}" in
  --gtest_list_tests) printf 'Suite.\\n  First\\n  Second\\n  Third\\n' ;;
  1) echo "[  FAILED  ] Suite.Second, an illegal address"; kill -ABRT $$ ;;
  0 | 2) echo "[  PASSED  ] $GTEST_SHARD_INDEX of $GTEST_TOTAL_SHARDS, waits: $CUDA_LAUNCH_BLOCKING" ;;
  *) kill -ABRT $$ ;;
esac
""")
    suite.chmod(0o755)
    _, results, _ = check("--device", "emulated", "--steps", "ops")
    log = (tmp_path / "out/ops.log").read_text()
    assert results["ops"] == "failed" and "its 3 tests one by one" in log
    assert "0 of 3, waits: 1" in log and "2 of 3, waits: 1" in log
    assert "[  FAILED  ] Suite.Second, an illegal address" in (tmp_path / "out/report.txt").read_text()


def test_a_step_without_time_is_skipped(check):
    code, results, told = check("--device", "emulated", "--minutes", "0")
    assert code == 1 and results == {"configure": "skipped"} and "-S" not in told


@pytest.mark.parametrize(("device", "visible", "architecture"), [
    ("cuda", "", "90"), ("cuda:1", "", "86"), ("cuda:1", "0,GPU-7", "120"), ("cuda:2", "", "80"),
])
def test_it_builds_for_the_gpu_that_it_uses(check, device, visible, architecture):
    _, _, told = check("--device", device, "--steps", "device", CUDA_VISIBLE_DEVICES=visible)
    assert f"-DCMAKE_CUDA_ARCHITECTURES={architecture}\n" in told or f"-DCMAKE_CUDA_ARCHITECTURES={architecture} " in told
