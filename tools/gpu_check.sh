#!/usr/bin/env bash
# Builds engine and tests for the GPU of this machine and tries them there: kernels against references, the engine
# against transformers' logits and against itself, the ring under stress, copies beside products, then decoding with
# made-up weights that are larger than the device's memory. Right before fast: what may be wrong comes first. The
# report is written after every step, so that whoever is cut off keeps what was found. No network.
# usage: gpu_check.sh [--device SPEC] [--out FOLDER] [--work FOLDER] [--nvcc PATH] [--steps "NAME..."] [--minutes N]
#          [--host-memory-gib N] [ARCHIVE]
#   ARCHIVE   what `make gpu-bundle` wrote; without one the archive that this script was unpacked from
#   --device  cuda (default), cuda:N, or emulated: a rehearsal with small shapes, without nvcc
#   --out     where the report goes: report.txt, report.json, logs (default: gpu-report)
#   --work    where the archive is unpacked and built; stays, and a later call builds only what changed (default: gpu-work)
#   --steps   only these, after the build; results of the others stay in the report if they are of the same version:
#             device ops goldens same-bits ring probe bench, or one bench by its name
#   --minutes what all of it may take (default: 9.5; ten times that on an emulated device). A step gets what is left, and
#             is skipped where next to nothing is
#   --host-memory-gib  for the benches, where the machine's memory grows as it is used and says too little of itself
set -euo pipefail

device=cuda out=gpu-report work=gpu-work archive= nvcc= steps= minutes=9.5 host_memory_gib=0
# An abort with all those weights would write them to disk.
ulimit -c 0
fail() { echo "gpu_check.sh: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?}; shift 2 ;;
    --out) out=${2:?}; shift 2 ;;
    --work) work=${2:?}; shift 2 ;;
    --nvcc) nvcc=${2:?}; shift 2 ;;
    --steps) steps=${2:?}; shift 2 ;;
    --minutes) minutes=${2:?}; shift 2 ;;
    --host-memory-gib) host_memory_gib=${2:?}; shift 2 ;;
    -*) fail "unknown option $1" ;;
    *) archive=$1; shift ;;
  esac
done
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--minutes is '$minutes', but must be a number"
[[ $device =~ ^(cuda|cuda:[0-9]+|emulated)$ ]] || fail "--device is '$device', but must be cuda, cuda:N or emulated"
jobs=${JOBS:-$(nproc)}
mkdir -p "$out" "$work"
out=$(realpath "$out") work=$(realpath "$work")
bench_names=(bench-mixtral-16-layers-16gb bench-qwen3-30b-a3b-16gb bench-mixtral-16-layers-24gb bench-qwen3-30b-a3b-24gb)
if [ "$device" = emulated ]; then bench_names=(bench-tiny); fi
known=(device ops goldens same-bits ring probe bench "${bench_names[@]}")
for name in $steps; do
  [[ " ${known[*]} " == *" $name "* ]] || fail "no step is called '$name': ${known[*]}"
done

# wanted NAME: whether the step is to run.
wanted() {
  [ -z "$steps" ] || [[ " $steps " == *" $1 "* ]] || [[ $1 == bench-* && " $steps " == *" bench "* ]]
}

# What changed is newer than all that was built of it; what did not keeps its time.
unpack() {
  local fresh=$work/unpacked file
  rm -rf "$fresh" && mkdir -p "$fresh" "$work/moed-gpu"
  tar -xzf "$archive" -C "$fresh"
  if rmdir "$work/moed-gpu" 2>/dev/null; then
    mv "$fresh/moed-gpu" "$work/moed-gpu"
    rm -rf "$fresh"
    return 0
  fi
  (cd "$fresh/moed-gpu" && find . -type f) | while IFS= read -r file; do
    if cmp -s "$fresh/moed-gpu/$file" "$work/moed-gpu/$file"; then continue; fi
    mkdir -p "$(dirname "$work/moed-gpu/$file")"
    cp --preserve=mode "$fresh/moed-gpu/$file" "$work/moed-gpu/$file"
  done
  (cd "$work/moed-gpu" && find . -path ./build -prune -o -type f -print) | while IFS= read -r file; do
    if [ ! -e "$fresh/moed-gpu/$file" ]; then rm "$work/moed-gpu/$file"; fi
  done
  rm -rf "$fresh"
}

root=$(realpath "$(dirname "$0")/..")
if [ -n "$archive" ]; then
  unpack
  root=$work/moed-gpu
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

# Toolkits that pip installs have libcudart.so.13 but no libcudart.so, by which linkers look: a root of links has both.
shadow_toolkit() {
  local toolkit shadow=$work/toolkit entry name
  toolkit=$(dirname "$(dirname "$(realpath "$nvcc")")")
  if [ ! -e "$toolkit/lib/libcudart.so.13" ] || [ -e "$toolkit/lib/libcudart.so" ]; then return 0; fi
  rm -rf "$shadow" && mkdir -p "$shadow/lib"
  for entry in "$toolkit"/*; do
    case $(basename "$entry") in
      lib | lib64) ;;
      bin) cp -rL --preserve=mode,timestamps "$entry" "$shadow/bin" ;;  # nvcc looks for its toolkit where it lies itself
      *) ln -s "$entry" "$shadow/" ;;
    esac
  done
  ln -s "$toolkit"/lib/* "$shadow/lib/"
  ln -s lib "$shadow/lib64"
  for entry in "$toolkit"/lib/*.so.*; do
    name=$(basename "$entry")
    if [ ! -e "$shadow/lib/${name%%.so.*}.so" ]; then ln -s "$name" "$shadow/lib/${name%%.so.*}.so"; fi
  done
  nvcc=$shadow/bin/nvcc
  options+=("-DCUDAToolkit_ROOT=$shadow")
}

# A rehearsal may run on any box.
patience=1
if [ "$device" = emulated ]; then patience=10; fi
seconds_max=$(awk "BEGIN {printf \"%d\", $minutes * 60 * $patience}")
# A step that would have less is skipped.
step_seconds_min=10

# record NAME RESULT SECONDS: in place of what an earlier call found.
record() {
  local others=
  if [ -e "$out/steps.txt" ]; then others=$(grep -v "^$1 " "$out/steps.txt" || true); fi
  { if [ -n "$others" ]; then echo "$others"; fi; echo "$*"; } >"$out/steps.next"
  mv "$out/steps.next" "$out/steps.txt"
  report >/dev/null || true
}

# why_failed NAME: what its log names, and how it ends.
why_failed() {
  grep -E '^\[  FAILED  \]|error:' "$out/$1.log" | head -n 40 || true
  tail -n 15 "$out/$1.log"
}

# What gpu_report makes of it, and of each step that failed what its log ends with.
report() {
  local code=1 name result seconds
  if [ -x "$build/tests/gpu/gpu_report" ]; then
    code=0
    "$build/tests/gpu/gpu_report" "$out" >/dev/null || code=$?
  else
    cat "$out/machine.txt" "$out/steps.txt" >"$out/report.txt"
    echo "$(grep -c ' passed ' "$out/steps.txt" || true) passed, $(grep -c ' failed ' "$out/steps.txt" || true) failed" >>"$out/report.txt"
  fi
  while read -r name result seconds; do
    if [ "$result" != failed ] || [ ! -e "$out/$name.log" ]; then continue; fi
    echo
    echo "Of $name.log, $seconds s"
    why_failed "$name"
  done <"$out/steps.txt" >"$out/failed.next"
  # The counts stay last.
  { head -n -1 "$out/report.txt"; cat "$out/failed.next"; tail -n 1 "$out/report.txt"; } >"$out/report.next"
  mv "$out/report.next" "$out/report.txt"
  rm "$out/failed.next"
  cat "$out/report.txt"
  return "$code"
}

# step NAME SECONDS_MAX COMMAND...: its result into steps.txt and the report, its output into NAME.log. What is cut off
# with the whole script has failed.
step() {
  local name=$1 limit=$(($2 * patience)) left=$((seconds_max - SECONDS)) began=$SECONDS code=0 result=passed
  shift 2
  echo "== $name"
  if [ "$left" -lt "$step_seconds_min" ]; then
    echo "   skipped: $SECONDS of $seconds_max s have passed (--minutes); --steps $name runs it alone"
    record "$name" skipped 0
    return 1
  fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  record "$name" failed 0
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || code=$?
  # A filter that no longer names any test must not pass.
  if grep -q '^\[==========\] Running 0 tests' "$out/$name.log"; then code=1; fi
  if [[ $name == bench-* && $device == cuda* && $code == 0 ]] && ! grep -q '"all_pinned": true' "$out/$name.json"; then
    echo "not all experts are pinned: $(grep -A 4 '"pins"' "$out/$name.json" | tr -s '\n ' ' ')" >>"$out/$name.log"
    code=1
  fi
  if [ "$code" != 0 ]; then
    result=failed
    echo "exit code $code; of $name.log:"
    why_failed "$name"
  fi
  record "$name" "$result" $((SECONDS - began))
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

options=(-C "$root/cmake/bundle/cache.cmake" -DCMAKE_BUILD_TYPE=Release -DMOED_WERROR=OFF)
targets=(gpu_device_test gpu_ops_test gpu_same_bits_test gpu_probe gpu_report
  engine_golden_test offload_test moed_bench_engine)
choose_options() {
  if command -v ninja >/dev/null; then options+=(-G Ninja); fi
  if [ "$device" = emulated ]; then return 0; fi
  find_nvcc
  shadow_toolkit
  options+=(-DMOED_CUDA=ON "-DCMAKE_CUDA_COMPILER=$nvcc" "-DCMAKE_CUDA_ARCHITECTURES=$(architecture)")
}

# That of the GPU that --device names. CUDA counts those it may see, by speed unless told to count as nvidia-smi does.
# What nvidia-smi says instead of a number is no architecture; code for 80 comes with PTX for all others.
export CUDA_DEVICE_ORDER=PCI_BUS_ID
architecture() {
  local index=0 visible=() capability
  if [[ $device == cuda:* ]]; then index=${device#cuda:}; fi
  IFS=, read -r -a visible <<<"${CUDA_VISIBLE_DEVICES:-}"
  capability=$({ nvidia-smi -i "${visible[index]:-$index}" --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } |
    head -n 1 | tr -d .)
  [[ $capability =~ ^[0-9]+$ ]] || capability=80
  echo "$capability"
}

# How long the steps take where the link is slow (PCIe 4 x16, 25 GB/s) and 16 cores build: configure and build 150 s, suites
# and probe 120 s. A bench: 8 threads make weights at 0.25 GB/s each and pin them meanwhile, 45 GB in 23 s and 58 GB in 29 s;
# then 8 sweeps over the link, one for all prompts with the first token (--pass-rows-max takes their 4096 rows at once) and
# one a further token: 8 x 45 / 25 = 15 s and 8 x 58 / 25 = 19 s. Four of them: 2 x (23 + 15 + 29 + 19) = 172 s, 442 s in all.
# bench NAME GIB ARGUMENT...
bench() {
  local name=$1 gib=$2
  shift 2
  wanted "bench-$name" || return 0
  rm -f "$out/bench-$name.json"
  step "bench-$name" 120 "$build/server/moed_bench_engine" --device "$device" --device-memory-gib "$gib" \
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
      --prompt 64 --new 8 --pass-rows-max 4096 --kv-gib 1 --max-model-len 1024 --host-memory-gib "$host_memory_gib"
    bench "qwen3-30b-a3b-${name}gb" "$gib" --shape qwen3-30b-a3b --policy stream --clients 64 --prompt 64 --new 8 \
      --pass-rows-max 4096 --kv-gib 1 --max-model-len 1024 --host-memory-gib "$host_memory_gib"
  done
}

# test_step NAME SECONDS_MAX COMMAND...: a step that may fail without the end of all others.
test_step() {
  wanted "$1" || return 0
  step "$@" || true
}

# suite NAME SECONDS_MAX TESTS [ARGUMENT...]: a GoogleTest binary, as test_step.
suite() {
  local name=$1 limit=$2
  shift 2
  test_step "$name" "$limit" bash -c "$(declare -f run_suite); run_suite \"\$@\"" suite "$@"
}

# A kernel that faults takes its process with it, and the tests that were to follow: then each runs in one of its own, with
# launches that wait, so that the op that faults is named.
run_suite() {
  local code=0 count index
  "$@" || code=$?
  if [ "$code" -lt 128 ]; then return "$code"; fi
  count=$("$@" --gtest_list_tests | grep -c '^  ')
  echo "the suite died ($code); its $count tests one by one:"
  for ((index = 0; index < count; ++index)); do
    CUDA_LAUNCH_BLOCKING=1 GTEST_TOTAL_SHARDS=$count GTEST_SHARD_INDEX=$index "$@" || true
  done
  return "$code"
}

choose_options
machine >"$out/machine.next"
# Results of another version, and those that are all to be found anew, do not belong to this report.
if [ -z "$steps" ] || ! cmp -s "$out/machine.next" "$out/machine.txt"; then
  rm -f "$out"/{machine,steps,report}.txt "$out"/{probe,report}.json
  for name in configure build "${known[@]}"; do rm -f "$out/$name.log"; done
  for name in "${bench_names[@]}"; do rm -f "$out/$name.json"; done
fi
mv "$out/machine.next" "$out/machine.txt"
cat "$out/machine.txt"
# With ccache a second check of an archive compiles only what changed, wherever it was unpacked.
export MOED_TEST_DEVICE=$device CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=1
if ! step configure 60 cmake -S "$root" -B "$build" "${options[@]}"; then
  report
  exit 1
fi
# What one unit breaks is not built; the rest is tried all the same.
keep_going=(-k)
if [ -e "$build/build.ninja" ]; then keep_going=(-k 0); fi
step build 240 cmake --build "$build" -j "$jobs" --target "${targets[@]}" -- "${keep_going[@]}" || true
tiny=()
if [ "$device" = emulated ]; then tiny=(--tiny); fi
suite device 45 "$build/tests/gpu/gpu_device_test"
suite ops 90 "$build/tests/gpu/gpu_ops_test"
suite goldens 90 "$build/tests/engine/engine_golden_test" --gtest_filter='*EveryPolicyEqualsTransformers*'
suite same-bits 90 "$build/tests/gpu/gpu_same_bits_test"
suite ring 60 "$build/tests/offload/offload_test" --gtest_filter='Devices/RingOn*'
test_step probe 60 "$build/tests/gpu/gpu_probe" "$device" "$out/probe.json" "${tiny[@]}"
benches
for name in $steps; do
  grep -q "^$name" "$out/steps.txt" || fail "no step is called '$name'"
done
report
