"""The files of deploy/ must fit the daemon: every key they set exists, and every command line they start is accepted."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOED = os.environ.get("MOED_BINARY", str(ROOT / "build/release/server/moed"))
CONFIGS = sorted((ROOT / "deploy/config").glob("*.toml"))


def run(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOED_")}
    return subprocess.run([MOED, *arguments], env=clean | environment, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)


def test_there_is_an_example_for_each_kind_of_machine():
    assert [path.stem for path in CONFIGS] == ["gpu-16gb", "gpu-24gb", "gpu-big", "laptop-cpu"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_daemon_takes_each_key(path):
    done = run("serve", "--config", str(path), "--model", "/models", "--print-config")
    assert done.returncode == 0, done.stderr
    printed = tomllib.loads(done.stdout)
    for section, fields in tomllib.loads(path.read_text()).items():
        for key, value in fields.items():
            assert printed[section][key] == value, f"{section}.{key}"


def exec_form(name):
    """The words of the last `NAME [...]` in the Dockerfile."""
    return re.findall(r'"([^"]*)"', re.findall(rf"^{name} (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.M)[-1])


def test_the_image_wants_a_key_before_it_binds_every_address():
    command = exec_form("CMD")
    refused = run(*command)
    assert refused.returncode == 1 and "insecure" in refused.stderr
    assert run(*command, "--print-config", MOED_API_KEY="secret").returncode == 0


def test_the_compose_file_publishes_on_loopback_only():
    text = (ROOT / "deploy/compose.yaml").read_text()
    ports = re.findall(r'^\s+- "([\d.:]+)"$', text, re.M)
    assert len(ports) == 2 and all(port.startswith("127.0.0.1:") for port in ports)
    command = re.findall(r'"([^"]*)"', re.search(r"^\s+command: (\[.*\])$", text, re.M).group(1))
    done = run(*command, "--print-config")
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["server"]["insecure"] is True


def test_the_unit_keeps_translated_kernels_where_it_may_write():
    unit = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / "deploy/moed.service").read_text(), re.M))
    assert unit["Environment"] == f"CUDA_CACHE_PATH=/var/cache/{unit['CacheDirectory']}"


def test_the_unit_starts_a_command_that_exists():
    (start,) = re.findall(r"^ExecStart=/usr/local/bin/moed (.*)$", (ROOT / "deploy/moed.service").read_text(), re.M)
    words = start.replace("/etc/moed/moed.toml", str(ROOT / "deploy/config/laptop-cpu.toml")).split()
    done = run(*words, "--model", "/models", "--print-config")
    assert done.returncode == 0, done.stderr
