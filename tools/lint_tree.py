#!/usr/bin/env python3
"""Rules about the tree that no compiler checks: which folder may include which, where ISA flags and CUDA headers may
be, sizes, words that do not belong in a public tree. usage: lint_tree.py [RULE...]; prints one line a finding and exits
1 if there is any. Rules: see RULES at the end."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The arrows of docs/ARCHITECTURE.md: folder -> what it may include besides itself and base/. A folder stands for all of
# its headers; an entry with a slash for that header alone.
ARROWS = {
    "base": [],
    "text": [],
    "proto": [],
    "model": [],
    "kernels": [],
    "plan": ["model/config.h"],
    "offload": ["kernels/device.h", "kernels/blob.h", "model"],
    "engine": ["offload", "kernels", "model", "plan/plan.h", "plan/profile.h"],
    "scheduler": ["plan", "engine/step.h"],
    "server": ["scheduler", "engine", "offload", "plan", "model", "text", "proto"],
}

# Third-party headers that only some folders may see.
HEADER_HOMES = [
    (re.compile(r"^(cuda|cublas|cub/|cutlass|flashinfer|nvtx)"), ("kernels/cuda/", "tests/")),
    (re.compile(r"^(immintrin|x86intrin|arm_neon|oneapi/dnnl|dnnl)"), ("kernels/host/", "base/", "tests/")),
    (re.compile(r"^(grpc|google/protobuf|boost/(asio|beast)|openssl/|CLI/|prometheus/)"),
     ("server/", "proto/", "tests/")),
    (re.compile(r"^toml\+\+"), ("base/toml.h", "tests/")),
]

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
PARAMETERS_MAX = 6
CPP_SUFFIXES = (".h", ".cpp", ".cc", ".cu", ".cuh", ".inc")
# Files that a tool writes, and data, are not read for size or words.
GENERATED = re.compile(r"(^|/)(Cargo\.lock|requirements-\w+\.txt|LICENSE)$|^tests/golden/.*\.(json|safetensors|bin)$")

INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.M)
ISA_FLAG = re.compile(r"-m(arch=|tune=|cpu=|avx|amx|fma|sse|f16c|bmi)\S*")
# Written so that this file does not hold what it looks for.
FORBIDDEN = [
    (re.compile(r"(py|test\.py)p[i]\.org|python[h]osted\.org|deb[.]debian\.org|security[.]debian\.org|[c]rates\.io"),
     "the host of a package registry"),
    (re.compile(r"(?<![\w.])/(wor[k]|hom[e]/\w+|roo[t])/"), "a path of somebody's machine"),
    (re.compile(r"<<<<<<[<] |>>>>>>[>] "), "a merge conflict"),
    (re.compile(r"\b(TOD[O]|FIXM[E]|XX[X])\b(?!\()"), "an open end without its reason: TOD" "O(reason)"),
    (re.compile(r"testing::TempDi[r]"), "a folder that cases which run at once share: tests/support/temporary_folder.h"),
]


def tracked_files():
    # safe.directory: a checkout may belong to another user than the one who runs the checks (containers, CI).
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    out = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    return [name for name in out.splitlines() if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8", errors="replace")


def may_include(folder, header):
    """Whether a file of `folder` may include the project's `header` (a path from the root)."""
    target = header.split("/", 1)[0]
    if target in (folder, "base"):
        return True
    return any(header == allowed or target == allowed for allowed in ARROWS[folder])


def layering_findings(name, text):
    """Findings for the includes of one C++ file; `name` is its path from the root."""
    folder = name.split("/", 1)[0]
    for match in INCLUDE.finditer(text):
        quote, header = match.groups()
        line = text.count("\n", 0, match.start(2)) + 1
        top = header.split("/", 1)[0]
        if quote == '"' and header.startswith("."):
            yield f"{name}:{line}: include from the root of the tree, not '{header}'"
        elif quote == '"' and folder in ARROWS and top in ARROWS and not may_include(folder, header):
            yield f"{name}:{line}: {folder}/ may not include '{header}' (allowed: base {' '.join(ARROWS[folder])})"
        elif quote == '"' and folder in ARROWS and top == "tests":
            yield f"{name}:{line}: {folder}/ may not include a test's header '{header}'"
        for pattern, homes in HEADER_HOMES:
            if folder in (*ARROWS, "tests") and pattern.match(header) and not name.startswith(homes):
                yield f"{name}:{line}: '{header}' belongs to {' '.join(homes)}"


def isa_findings(units):
    """Findings for compile commands [(path from the root, command line)]."""
    for name, command in units:
        flag = ISA_FLAG.search(command)
        if flag and not name.startswith("kernels/host/"):
            yield f"{name}: compiled with {flag.group(0)}; ISA flags are for files under kernels/host/"


def size_findings(name, text):
    lines = text.count("\n")
    if lines > FILE_LINES_MAX:
        yield f"{name}: {lines} lines, at most {FILE_LINES_MAX}"


def word_findings(name, text):
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, what in FORBIDDEN:
            match = pattern.search(line)
            if match:
                yield f"{name}:{number}: '{match.group(0)}' ({what})"


def function_findings(name):
    import lizard  # of the project's venv

    for function in lizard.analyze_file(str(ROOT / name)).function_list:
        length = function.end_line - function.start_line + 1
        where = f"{name}:{function.start_line}: {function.name}"
        if length > FUNCTION_LINES_MAX:
            yield f"{where}: {length} lines, at most {FUNCTION_LINES_MAX}"
        if len(function.parameters) > PARAMETERS_MAX:
            yield f"{where}: {len(function.parameters)} parameters, at most {PARAMETERS_MAX}"


def cpp_files():
    return [name for name in tracked_files() if name.endswith(CPP_SUFFIXES)]


def rule_layering():
    return [f for name in cpp_files() for f in layering_findings(name, read(name))]


def rule_isa():
    database = ROOT / "build/release/compile_commands.json"
    if not database.is_file():
        return [f"{database.relative_to(ROOT)} is missing: configure first (make build)"]
    units = []
    for entry in json.loads(database.read_text()):
        path = Path(entry["file"])
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "build"):
            units.append((str(path.relative_to(ROOT)), entry["command"]))
    return list(isa_findings(units))


def rule_sizes():
    texts = [name for name in tracked_files() if name.endswith((*CPP_SUFFIXES, ".py", ".rs", ".sh"))]
    return [f for name in texts if not GENERATED.search(name) for f in size_findings(name, read(name))]


def rule_functions():
    return [f for name in cpp_files() if not name.endswith(".inc") for f in function_findings(name)]


def rule_words():
    found = []
    for name in tracked_files():
        data = (ROOT / name).read_bytes()
        if GENERATED.search(name) or b"\0" in data[:4096]:
            continue
        found += word_findings(name, data.decode("utf-8", errors="replace"))
    return found


RULES = {"layering": rule_layering, "isa": rule_isa, "sizes": rule_sizes, "functions": rule_functions,
         "words": rule_words}


def main(names):
    unknown = [name for name in names if name not in RULES]
    if unknown:
        print(f"lint_tree.py: unknown rule {' '.join(unknown)}; there are: {' '.join(RULES)}", file=sys.stderr)
        return 2
    found = [finding for name in names or RULES for finding in RULES[name]()]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
