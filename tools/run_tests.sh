#!/usr/bin/env bash
# What `make test` does: install, build everything once, lint, ctest, end to end; with CUDA=1 then what `make cuda` does.
# A part that fails does not stop the next ones; the last line counts all of them and the exit code is 0 only when
# nothing failed.
set -uo pipefail
cd "$(dirname "$0")/.."
jobs=${JOBS:-$(nproc)}
build=build/release
reports=$PWD/build/reports
export JOBS=$jobs PYTHONDONTWRITEBYTECODE=1
began=$SECONDS

step() { echo; echo "== $* ($((SECONDS - began)) s)"; }
give_up() { echo "run_tests.sh: $1"; echo "0 passed, 1 failed"; exit 1; }

rm -rf "$reports" && mkdir -p "$reports"
step "install what is missing"
tools/install_deps.sh test || give_up "installing failed"
step "configure"
cmake --preset release --log-level=WARNING || give_up "configuring failed"
step "build with $jobs jobs"
cmake --build "$build" -j "$jobs" || give_up "the build failed"
step "demo model"
.venv/bin/python tools/make_demo.py --out models/demo || give_up "making the demo model failed"
step "lint"
tools/lint.sh "$reports/lint.txt"
step "ctest"
ctest --test-dir "$build" -j "$jobs" --output-on-failure --no-tests=error --output-junit "$reports/ctest.xml" |
  awk '/ Passed / {if (++n % 50 == 0) {print "ctest: " n " passed"; fflush()}; next}
    / Start +[0-9]+:/ {next} {print; fflush()}'
ctest_code=${PIPESTATUS[0]}
step "end to end"
MOED_BINARY=$PWD/$build/server/moed MOED_DEMO=$PWD/models/demo .venv/bin/python -m pytest -p no:cacheprovider \
  -v --timeout=600 --durations=5 --junitxml="$reports/e2e.xml" tests/e2e
e2e_code=$?
parts=("ctest=$ctest_code" "e2e=$e2e_code")
if [ "${CUDA:-0}" = 1 ]; then
  step "cuda"
  tools/build_cuda.sh "$reports/cuda.txt"
  parts+=("cuda=$?")
fi
step "result"
echo "took $((SECONDS - began)) s"
.venv/bin/python tools/count_results.py "$reports" "${parts[@]}"
