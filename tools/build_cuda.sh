#!/usr/bin/env bash
# What `make cuda` does: nvcc and CUDA's libraries into .venv-cuda, the daemon with the device cuda at
# build/release/cuda/moed (its other objects are those of the daemon without), and a look at what it says here.
# usage: tools/build_cuda.sh [REPORT]   REPORT: results, one "cuda NAME: passed|failed" a line
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=${JOBS:-$(nproc)}
report=${1:-/dev/null}
build=build/release
moed=$build/cuda/moed

result() { echo "cuda $1: $2" | tee -a "$report"; }

build_daemon() {
  cmake --preset cuda --log-level=WARNING >/dev/null && cmake --build "$build" --target moed -j "$jobs"
}

# What the daemon says when it is asked to serve on the GPU: with a driver that is up to the driver; without one it is
# one line that names the reason, and exit code 1.
check_without_driver() {
  local said code=0
  said=$("$moed" serve --model models/demo --device cuda --http-port 0 --grpc-port 0 2>&1 </dev/null) || code=$?
  said=$(grep -v ' info ' <<<"$said")
  echo "exit code $code: $said"
  [ "$code" = 1 ] && [ "$(wc -l <<<"$said")" = 1 ] && grep -q 'device cuda: .*driver' <<<"$said"
}

tools/install_deps.sh cuda
# The tree goes back to what `make build` and `make test` expect, whatever happens.
trap 'cmake --preset release --log-level=WARNING >/dev/null' EXIT
if build_daemon; then result build passed; else result build failed; exit 1; fi
if nvidia-smi -L >/dev/null 2>&1; then
  echo "cuda: $(nvidia-smi -L | head -1); serve there: make serve"
elif [ ! -e models/demo/config.json ]; then
  echo "cuda: no demo model, so nothing was started (make demo)"
elif check_without_driver; then
  result says-why-not passed
else
  result says-why-not failed
  exit 1
fi
