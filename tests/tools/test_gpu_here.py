"""tools/gpu_here.sh, which says whether `make serve` builds for the GPU, with an nvidia-smi of the test's."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def gpu_here(tmp_path, driver, capabilities, code=0):
    """(exit code, the line) where nvidia-smi says so; None: there is none."""
    for name in ("bash", "env", "grep", "sort"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    if driver is not None:
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/bash\ncase $1 in *driver*) echo -e '{driver}' ;; *) echo -e '{capabilities}' ;; esac\nexit {code}\n")
        smi.chmod(0o755)
    run = subprocess.run([ROOT / "tools/gpu_here.sh"], capture_output=True, text=True, check=False,
                         env={**os.environ, "PATH": str(tmp_path)})
    assert run.stdout.count("\n") == 1 and run.stderr == "", run
    return run.returncode, run.stdout.rstrip()


@pytest.mark.parametrize(("driver", "capabilities", "architectures"), [
    ("580.65.06", "9.0", "90"),
    ("580.65.06\\n580.65.06\\n580.65.06", "9.0\\n8.6\\n9.0", "86;90"),
    ("590.44", "12.0\\n7.5", "120"),
])
def test_it_names_what_to_build_for(tmp_path, driver, capabilities, architectures):
    assert gpu_here(tmp_path, driver, capabilities) == (0, architectures)


@pytest.mark.parametrize(("driver", "capabilities", "code", "why"), [
    (None, "", 0, "no NVIDIA driver"),
    ("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", "", 9, "no NVIDIA driver"),
    ("No devices were found", "No devices were found", 0, "no NVIDIA driver"),
    ("570.133.20", "9.0", 0, "570.133.20 does not run CUDA 13: 580"),
    ("470.57.02", 'Field "compute_cap" is not a valid field to query.', 2, "470.57.02 does not run CUDA 13"),
    ("580.65.06", "7.5", 0, "8.0 or later (nvidia-smi says: 7.5)"),
    ("580.65.06", "[N/A]", 0, "nvidia-smi says: nothing"),
])
def test_it_says_why_not(tmp_path, driver, capabilities, code, why):
    result = gpu_here(tmp_path, driver, capabilities, code)
    assert result[0] == 1 and why in result[1], result
