#!/usr/bin/env bash
# What `make cuda` does: nvcc and CUDA's libraries into .venv-cuda, the daemon with the device cuda at
# build/release/cuda/moed (its other objects are those of the daemon without), and a look at what it says here.
# usage: tools/build_cuda.sh [--build-only] [REPORT]
#   --build-only  the daemon alone, nothing is run: for `make serve`, which must not depend on tests
#   REPORT        results, one "cuda NAME: passed|failed" a line
#   ARCHS         environment: compute capabilities to build for ("86;90"), or all; default: those of this machine's
#                 GPUs, without one 80
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=${JOBS:-$(nproc)}
build_only=
if [ "${1:-}" = --build-only ]; then build_only=1; shift; fi
report=${1:-/dev/null}
build=build/release
moed=$build/cuda/moed
# PTX of the first, which drivers translate for GPUs between and after these.
all_architectures='80;86-real;89-real;90-real;100-real;120-real'

result() { echo "cuda $1: $2" | tee -a "$report"; }

# A GPU that this nvcc has not heard of translates the PTX of 80.
architectures_here() {
  local here architecture known
  here=$(tools/gpu_here.sh) || here=80
  known=$(.venv-cuda/toolkit/bin/nvcc --list-gpu-arch)
  for architecture in ${here//;/ }; do
    if ! grep -qx "compute_$architecture" <<<"$known"; then here=80; fi
  done
  echo "$here"
}

# The suites of tools/gpu_check.sh come along: without a GPU they run on the emulated device, so that a GPU's machine
# is not the first to try them.
targets=(moed)
if [ -z "$build_only" ]; then targets+=(gpu_device_test gpu_ops_test gpu_same_bits_test gpu_probe gpu_report); fi
build_all() {
  local architectures=${ARCHS:-}
  case $architectures in
    '') architectures=$(architectures_here) || return 1 ;;
    all) architectures=$all_architectures ;;
  esac
  echo "cuda: building for compute capability $architectures"
  cmake --preset cuda "-DCMAKE_CUDA_ARCHITECTURES=$architectures" --log-level=WARNING >/dev/null &&
    cmake --build "$build" -j "$jobs" --target "${targets[@]}"
}

# What the daemon says when it is asked to serve on the GPU of a machine that has none for it: one line that names the
# reason, and exit code 1.
says_why_not() {
  local said code=0
  said=$("$moed" serve --model models/demo --device cuda --http-port 0 --grpc-port 0 2>&1 </dev/null) || code=$?
  said=$(grep -v ' info ' <<<"$said")
  echo "exit code $code: $said"
  [ "$code" = 1 ] && [ "$(wc -l <<<"$said")" = 1 ] && grep -q 'device cuda: ' <<<"$said"
}

# What it does when it is asked for no device: one line that names the reason, then it serves from the CPU.
serves_without() {
  local log=$build/cuda-serves.log pid code=0
  "$moed" serve --model models/demo --kv-gib 0.25 --http-port 0 --grpc-port 0 >"$log" 2>&1 </dev/null &
  pid=$!
  for _ in $(seq 600); do
    if grep -q ' ready' "$log" || ! kill -0 "$pid" 2>/dev/null; then break; fi
    sleep 0.1
  done
  kill -TERM "$pid" 2>/dev/null || true
  wait "$pid" || code=$?
  cat "$log"
  [ "$code" = 0 ] && grep -q ' ready' "$log" && [ "$(grep -c 'device cuda: .*; the CPU serves' "$log")" = 1 ]
}

probes() {
  local folder=$build/gpu-report
  local size=()
  if [ "$device" = emulated ]; then size=(--tiny); fi
  # A function that is asked for its result does not stop at what fails in it.
  rm -rf "$folder" && mkdir -p "$folder" &&
    "$build/tests/gpu/gpu_probe" "$device" "$folder/probe.json" "${size[@]}" >/dev/null &&
    echo "device $device" >"$folder/machine.txt" && echo "probe passed 0" >"$folder/steps.txt" &&
    "$build/tests/gpu/gpu_report" "$folder"
}

# The archive holds what its own CMake lists name.
bundles() {
  local folder=$build/gpu-bundle
  rm -rf "$folder" && mkdir -p "$folder" || return 1
  tools/gpu_bundle.sh "$folder/moed-gpu.tar.gz" || return 1
  tar -xzf "$folder/moed-gpu.tar.gz" -C "$folder" || return 1
  cmake -C "$folder/moed-gpu/cmake/bundle/cache.cmake" -S "$folder/moed-gpu" -B "$folder/build" --log-level=WARNING >/dev/null
}

check() {
  local name=$1 code=0
  shift
  "$@" >"$build/cuda-$name.log" 2>&1 || code=$?
  if [ "$code" = 0 ]; then result "$name" passed; return 0; fi
  tail -n 30 "$build/cuda-$name.log"
  result "$name" failed
  failed=1
}

tools/install_deps.sh cuda
# The tree goes back to what `make build` and `make test` expect, whatever happens.
trap 'cmake --preset release --log-level=WARNING >/dev/null' EXIT
if build_all; then result build passed; else result build failed; exit 1; fi
if [ -n "$build_only" ]; then exit 0; fi
failed=0
device=emulated
if tools/gpu_here.sh; then
  device=cuda
  nvidia-smi -L
elif [ -e models/demo/config.json ]; then
  check says-why-not says_why_not
  check serves-without serves_without
else
  echo "cuda: no demo model, so the daemon was not started (make demo)"
fi
export MOED_TEST_DEVICE=$device
check device "$build/tests/gpu/gpu_device_test"
check ops "$build/tests/gpu/gpu_ops_test"
check same-bits "$build/tests/gpu/gpu_same_bits_test"
check probe probes
check bundle bundles
exit "$failed"
