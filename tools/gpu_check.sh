#!/usr/bin/env bash
# Builds engine and tests for the GPU of this machine and tries them there: kernels against references, the engine
# against transformers' logits and against itself, the ring under stress, copies beside products, then decoding with
# made-up weights that are larger than the device's memory. Under ten minutes on 16 cores; no network.
# usage: gpu_check.sh [--device SPEC] [--out FOLDER] [--nvcc PATH] [ARCHIVE]
#   ARCHIVE   what `make gpu-bundle` wrote; without one the archive that this script was unpacked from
#   --device  cuda (default), cuda:N, or emulated: a rehearsal with small shapes, without nvcc
#   --out     where the report goes: report.txt, report.json, logs (default: gpu-report)
set -euo pipefail

device=cuda out=gpu-report archive= nvcc=
fail() { echo "gpu_check.sh: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?}; shift 2 ;;
    --out) out=${2:?}; shift 2 ;;
    --nvcc) nvcc=${2:?}; shift 2 ;;
    -*) fail "unknown option $1" ;;
    *) archive=$1; shift ;;
  esac
done
case $device in cuda | cuda:* | emulated) ;; *) fail "--device is '$device', but must be cuda, cuda:N or emulated" ;; esac
jobs=${JOBS:-$(nproc)}
rm -rf "$out" && mkdir -p "$out"
out=$(realpath "$out")

if [ -n "$archive" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  tar -xzf "$archive" -C "$work"
  root=$work/moed-gpu
else
  root=$(realpath "$(dirname "$0")/..")
fi
[ -d "$root/third_party" ] || fail "$root holds no unpacked archive: name the one that 'make gpu-bundle' wrote"
build=$root/build

find_nvcc() {
  local candidate
  for candidate in "$nvcc" "${CUDACXX:-}" "$(command -v nvcc || true)" "${CUDA_HOME:-/none}/bin/nvcc" \
    /usr/local/cuda/bin/nvcc /usr/local/cuda-13*/bin/nvcc /opt/cuda/bin/nvcc; do
    if [ -n "$candidate" ] && [ -x "$candidate" ]; then nvcc=$candidate; return 0; fi
  done
  fail "no nvcc found: give its path with --nvcc"
}

# A rehearsal may run on any box.
patience=1
if [ "$device" = emulated ]; then patience=10; fi

# step NAME SECONDS_MAX COMMAND...: its result into steps.txt, its output into NAME.log.
step() {
  local name=$1 limit=$(($2 * patience)) began=$SECONDS code=0 result=passed
  shift 2
  echo "== $name"
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || code=$?
  # A filter that no longer names any test must not pass.
  if grep -q '^\[==========\] Running 0 tests' "$out/$name.log"; then code=1; fi
  if [ "$code" != 0 ]; then
    result=failed
    echo "exit code $code; the end of $name.log:"
    tail -n 15 "$out/$name.log"
  fi
  echo "$name $result $((SECONDS - began))" >>"$out/steps.txt"
  echo "   $result, $((SECONDS - began)) s"
  [ "$result" = passed ]
}

machine() {
  echo "moed $(tr '\n' ' ' <"$root/VERSION")on $(sed -n '0,/^model name/s/^model name[[:space:]]*: //p' /proc/cpuinfo)," \
    "$(nproc) CPUs, $(awk '/^MemTotal/ {printf "%.0f GiB", $2 / 1048576}' /proc/meminfo)"
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap,pcie.link.gen.max,pcie.link.width.max \
    --format=csv,noheader 2>/dev/null || echo "no GPU"
  if [ -n "$nvcc" ]; then "$nvcc" --version | tail -n 2; fi
  cmake --version | head -n 1
  "${CXX:-c++}" --version | head -n 1
}

# Own kernels on the host, so that nothing depends on which libraries a machine happens to have.
options=(-DCMAKE_BUILD_TYPE=Release -DMOED_ENGINE_ONLY=ON -DMOED_WERROR=OFF -DMOED_ONEDNN=OFF)
targets=(gpu_device_test gpu_ops_test gpu_same_bits_test gpu_probe gpu_report
  engine_golden_test offload_test moed_bench_engine)
choose_options() {
  local package capability
  for package in spdlog nlohmann_json CLI11 GTest; do options+=("-D${package}_DIR=$root/cmake/bundle"); done
  if command -v ninja >/dev/null; then options+=(-G Ninja); fi
  if [ "$device" = emulated ]; then return 0; fi
  find_nvcc
  capability=$({ nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } | head -n 1 | tr -d .)
  options+=(-DMOED_CUDA=ON "-DCMAKE_CUDA_COMPILER=$nvcc" "-DCMAKE_CUDA_ARCHITECTURES=${capability:-80}")
}

# bench NAME GIB ARGUMENT...
bench() {
  local name=$1 gib=$2
  shift 2
  step "bench-$name" 170 "$build/server/moed_bench_engine" --device "$device" --device-memory-gib "$gib" \
    --json "$out/bench-$name.json" "$@" || true
}

benches() {
  if [ "$device" = emulated ]; then
    bench tiny 1 --shape olmoe-1b-7b --layers 1 --policy stream --clients 2 --prompt 8 --new 6 --long-after 2 \
      --kv-gib 0.1 --max-model-len 256 --pass-rows-max 16
    return
  fi
  # 16 and 24 GB, of which the device keeps half a GiB to itself.
  local name gib
  for name in 16 24; do
    gib=$(awk "BEGIN {printf \"%.3f\", $name * 1e9 / 1073741824 - 0.5}")
    bench "mixtral-16-layers-${name}gb" "$gib" --shape mixtral-8x7b --layers 16 --policy stream --clients 64 \
      --prompt 64 --new 24 --kv-gib 4 --max-model-len 1024
    bench "qwen3-30b-a3b-${name}gb" "$gib" --shape qwen3-30b-a3b --policy stream --clients 64 --prompt 64 --new 24 \
      --kv-gib 4 --max-model-len 1024
  done
}

choose_options
machine >"$out/machine.txt"
cat "$out/machine.txt"
# With ccache a second check of an archive compiles only what changed, wherever it was unpacked.
export MOED_TEST_DEVICE=$device CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=1
if ! step configure 60 cmake -S "$root" -B "$build" "${options[@]}" ||
  ! step build 240 cmake --build "$build" -j "$jobs" --target "${targets[@]}"; then
  echo "0 passed, 1 failed"
  exit 1
fi
tiny=()
if [ "$device" = emulated ]; then tiny=(--tiny); fi
step probe 90 "$build/tests/gpu/gpu_probe" "$device" "$out/probe.json" "${tiny[@]}" || true
step device 60 "$build/tests/gpu/gpu_device_test" || true
step ops 120 "$build/tests/gpu/gpu_ops_test" || true
step goldens 120 "$build/tests/engine/engine_golden_test" --gtest_filter='*EveryPolicyEqualsTransformers*' || true
step same-bits 120 "$build/tests/gpu/gpu_same_bits_test" || true
step ring 120 "$build/tests/offload/offload_test" --gtest_filter='Devices/RingOn*' || true
benches
"$build/tests/gpu/gpu_report" "$out"
