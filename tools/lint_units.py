#!/usr/bin/env python3
"""Runs one of clang's checks over the units of compile_commands.json. usage: lint_units.py thread-safety|tidy

tidy: clang-tidy-16 with .clang-tidy's small set over the core's units; -Wthread-safety is in that set.
thread-safety: clang++-16 -Wthread-safety -Werror -fsyntax-only over every other unit that clang can parse and that
reaches base/thread_annotations.h: without an annotation there is nothing to analyse.

A unit that passed is not read again until it, a header it includes (as the build found them), its command or this tool's
settings change: stamps lie in build/lint/. Prints what clang said about the units that fail, and exits 1 if any does."""

import concurrent.futures
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/release"
STAMPS = ROOT / "build/lint"
ANNOTATIONS = '"base/thread_annotations.h"'
# libstdc++ 12's coroutines do not parse with clang 16, and these headers bring Asio's in.
UNPARSABLE = re.compile(r"<(boost/asio|boost/beast)|<coroutine>")
# Besides them tidy leaves out what is mostly somebody else's headers, and tests.
TIDY_FOLDERS = ("base/", "model/", "kernels/", "plan/", "offload/", "engine/", "scheduler/", "server/")
TIDY_SKIPS = re.compile(r"<(grpc|google/protobuf|CLI/|toml\+\+)|\.pb\.h\"")
# GCC's flags that clang does not know.
GCC_ONLY = ("-fno-sanitize-recover=all", "-fmodules-ts", "-fmodule-mapper")
CLANG_FLAGS = ["-Wno-unknown-warning-option", "-Wno-unused-command-line-argument",
               "-Wno-gnu-zero-variadic-macro-arguments"]


def units(mode):
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        path = Path(entry["file"])
        if not path.is_relative_to(ROOT) or path.is_relative_to(ROOT / "build") or path.suffix != ".cpp":
            continue
        name = str(path.relative_to(ROOT))
        text = includes_text(path)
        if UNPARSABLE.search(text):
            continue
        is_core = name.startswith(TIDY_FOLDERS) and not TIDY_SKIPS.search(text)
        wanted = is_core if mode == "tidy" else not is_core and ANNOTATIONS in text
        if wanted:
            yield name, clang_arguments(entry)


def includes_text(path, seen=None):
    """The include lines of a file and of the project's headers it reaches."""
    seen = set() if seen is None else seen
    if path in seen or not path.is_file():
        return ""
    seen.add(path)
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.lstrip().startswith("#include")]
    ours = [ROOT / match.group(1) for line in lines if (match := re.match(r'\s*#include "([^"]+)"', line))]
    return "\n".join(lines + [includes_text(header, seen) for header in ours])


def clang_arguments(entry):
    """The unit's own flags without launcher, compiler, output and what only GCC knows."""
    words = [word for word in shlex.split(entry["command"]) if not word.endswith("ccache")][1:]
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("-o", "-MF", "-MT", "-MQ"):
            skip = True
        elif word not in ("-c", "-MD", "-MMD", entry["file"]) and not word.startswith(GCC_ONLY):
            kept.append(word)
    return kept + CLANG_FLAGS


def settings_digest(mode, arguments):
    digest = hashlib.sha256(" ".join([mode, *arguments]).encode())
    digest.update(Path(__file__).read_bytes())
    digest.update((ROOT / ".clang-tidy").read_bytes())
    return digest.hexdigest()


def built_from():
    """{unit: the files that the compiler read for it}"""
    text = subprocess.run(["ninja", "-C", str(BUILD), "-t", "deps"], capture_output=True, text=True, check=True).stdout
    found = {}
    for block in text.split("\n\n"):
        files = [(BUILD / line.strip()).resolve() for line in block.splitlines() if line.startswith("    ")]
        if files and files[0].is_relative_to(ROOT):
            found[str(files[0].relative_to(ROOT))] = [str(file) for file in files]
    return found


def still_good(stamp, digest):
    """Whether the stamp names this digest and no file it lists is newer."""
    try:
        first, *files = stamp.read_text().splitlines()
        age = stamp.stat().st_mtime
        return first == digest and all(os.stat(file).st_mtime < age for file in files)
    except OSError:
        return False


def included(name, arguments):
    """What clang reads for a unit that the build leaves out."""
    done = subprocess.run(["clang++-16", *arguments, "-w", "-M", name], cwd=ROOT, capture_output=True, text=True)
    files = done.stdout.replace("\\\n", " ").split(":", 1)[-1].split()
    return [str((ROOT / file).resolve()) for file in files]


def check(mode, name, arguments, files):
    """None when the unit passes, else what clang said. files: those whose change makes it be read again."""
    stamp = STAMPS / mode / (name.replace("/", "_") + ".ok")
    digest = settings_digest(mode, arguments)
    if still_good(stamp, digest):
        return None
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    started = stamp.with_suffix(".begun")
    started.touch()
    if mode == "thread-safety":
        command = ["clang++-16", *arguments, "-Wthread-safety", "-Werror", "-fsyntax-only", name]
    else:
        command = ["clang-tidy-16", "--quiet", name, "--", *arguments, "-Wthread-safety"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        return re.sub(r"^\d+ warnings? generated\.\n", "", done.stdout, flags=re.M)
    stamp.write_text("\n".join([digest, *(files or included(name, arguments))]) + "\n")
    times = started.stat()
    os.utime(stamp, (times.st_atime, times.st_mtime))
    started.unlink()
    return None


def main(mode):
    work = dict(units(mode))
    files = built_from()
    jobs = int(os.environ.get("JOBS") or os.cpu_count())
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(check, mode, name, arguments, files.get(name)): name for name, arguments in sorted(work.items())}
        for number, run in enumerate(concurrent.futures.as_completed(runs), 1):
            if run.result() is not None:
                failed += 1
                print(f"{runs[run]}: {mode} failed\n{run.result()}")
            if number % 20 == 0:
                print(f"{mode}: {number} of {len(work)} units", flush=True)
    print(f"{mode}: {len(work)} units, {failed} failed")
    return 1 if failed or not work else 0


if __name__ == "__main__":
    if sys.argv[1:] not in (["thread-safety"], ["tidy"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
