"""The tree's rules must see what breaks them: each case is a small piece of source and the findings it must give."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "tools/lint_tree.py"
spec = importlib.util.spec_from_file_location("lint_tree", PATH)
lint = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lint)


def layering(name, *headers):
    return list(lint.layering_findings(name, "".join(f"#include {h}\n" for h in headers)))


@pytest.mark.parametrize("name, header", [
    ("base/status.h", '"engine/engine.h"'),
    ("model/config.cpp", '"kernels/device.h"'),
    ("plan/policies.cpp", '"model/weights.h"'),
    ("plan/policies.cpp", '"engine/step.h"'),
    ("kernels/ops.h", '"model/config.h"'),
    ("offload/store.cpp", '"kernels/ops.h"'),
    ("offload/store.cpp", '"plan/plan.h"'),
    ("engine/pass.cpp", '"plan/policies.h"'),
    ("engine/pass.cpp", '"scheduler/request.h"'),
    ("scheduler/scheduler.cpp", '"engine/engine.h"'),
    ("scheduler/scheduler.cpp", '"model/config.h"'),
    ("text/tokenizer.cpp", '"model/config.h"'),
    ("server/main.cpp", '"kernels/ops.h"'),
    ("server/main.cpp", '"tests/server/fake_engine.h"'),
    ("server/main.cpp", '"../engine/engine.h"'),
    ("kernels/ops.cpp", "<cuda_runtime.h>"),
    ("engine/pass.cpp", "<immintrin.h>"),
    ("engine/pass.cpp", "<oneapi/dnnl/dnnl.hpp>"),
    ("scheduler/scheduler.cpp", "<grpcpp/grpcpp.h>"),
])
def test_a_bad_include_is_found(name, header):
    (finding,) = layering(name, "<vector>", header, '"base/status.h"')
    assert finding.startswith(f"{name}:2: ")


def test_allowed_includes_pass():
    assert not layering("server/main.cpp", '"engine/engine.h"', '"text/tokenizer.h"', '"server/http.h"', "<grpcpp/server.h>")
    assert not layering("scheduler/scheduler.cpp", '"plan/plan.h"', '"engine/step.h"', '"base/status.h"')
    assert not layering("engine/pass.cpp", '"plan/plan.h"', '"plan/profile.h"', '"kernels/ops.h"', '"model/weights.h"')
    assert not layering("plan/cost.cpp", '"model/config.h"')
    assert not layering("kernels/host/gemm_avx512.cpp", "<immintrin.h>")
    assert not layering("kernels/cuda/moe.cu", "<cuda_runtime.h>")
    assert not layering("tests/engine/golden_test.cpp", '"engine/engine.h"', '"scheduler/request.h"')


def test_isa_flags_have_one_home():
    bad = list(lint.isa_findings([("engine/pass.cpp", "c++ -O2 -mavx512bf16 -c pass.cpp")]))
    assert len(bad) == 1 and "-mavx512bf16" in bad[0]
    assert not list(lint.isa_findings([("kernels/host/gemm_avx512.cpp", "c++ -mavx512f -c x.cpp"),
                                       ("engine/pass.cpp", "c++ -O2 -MD -MT x -c pass.cpp")]))


def test_sizes():
    assert not list(lint.size_findings("base/a.cpp", "x\n" * lint.FILE_LINES_MAX))
    assert list(lint.size_findings("base/a.cpp", "x\n" * (lint.FILE_LINES_MAX + 1)))


def test_functions(tmp_path, monkeypatch):
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    body = "  x += 1;\n" * lint.FUNCTION_LINES_MAX
    (tmp_path / "a.cpp").write_text(f"int long_one(int x) {{\n{body}  return x;\n}}\n"
                                    "int wide(int a, int b, int c, int d, int e, int f, int g) { return a; }\n"
                                    "int fine(int a) { return a; }\n")
    found = list(lint.function_findings("a.cpp"))
    assert len(found) == 2 and "long_one" in found[0] and "wide" in found[1]


@pytest.mark.parametrize("line", ["see /wor" "k/main/x", "from https://py" "pi.org/simple", "// TO" "DO fix", "<<<<" "<<< HEAD",
                                  "testing::Temp" "Dir()"])
def test_words_that_do_not_belong(line):
    assert list(lint.word_findings("docs/x.md", f"fine\n{line}\n"))


def test_ordinary_words_pass():
    text = "the work/queue of a network/host\n// TO" "DO(gcc 13): use <format>\n/usr/lib and /models and ~/work\n"
    assert not list(lint.word_findings("docs/x.md", text))
