#!/usr/bin/env bash
# Builds the fuzz targets of tests/fuzz with clang and runs each, as many at once as there are cores (or JOBS).
#   tools/fuzz.sh [SECONDS a target, 600] [TARGET...]
# Prints a line a target: inputs tried, and what was found. Inputs that are findings stay in build/fuzz/findings, the corpora in
# build/fuzz/corpus, for the next run to start from. Exits 1 if there is a finding.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-600}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(config safetensors settings request text)
jobs=${JOBS:-$(nproc)}
build=$PWD/build/fuzz

export RUSTC_WRAPPER=$PWD/tests/fuzz/rustc_covered.sh
mkdir -p "$build/findings" "$build/logs"
cmake --preset fuzz --log-level=WARNING >"$build/configure.log"
cmake --build "$build" -j "$jobs" --target "${targets[@]/#/fuzz_}" >"$build/build.log" || { tail -50 "$build/build.log"; exit 1; }
# Inputs that are read as files are written to memory.
[ -w /dev/shm ] && export TMPDIR=/dev/shm

run_one() {
  local name=$1 seconds=$2 build=$3
  local corpus=$build/corpus/$name more=()
  mkdir -p "$corpus"
  [ "$name" = settings ] && more=(deploy/config)
  if [ "$name" = config ]; then
    more=("$build/goldens")
    mkdir -p "$build/goldens"
    for file in tests/golden/*/config.json; do cp "$file" "$build/goldens/$(basename "$(dirname "$file")")"; done
  fi
  local log=$build/logs/$name.txt code=0
  "$build/tests/fuzz/fuzz_$name" -max_total_time="$seconds" -max_len=16384 -timeout=10 -rss_limit_mb=3000 -print_final_stats=1 \
    -artifact_prefix="$build/findings/$name-" "$corpus" "tests/fuzz/seeds/$name" "${more[@]}" >"$log" 2>&1 || code=$?
  local tried found
  tried=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  if [ $code = 0 ]; then found="no finding"; else found="a FINDING, see build/fuzz/logs/$name.txt"; fi
  echo "fuzz_$name: ${tried:-?} inputs in $seconds s, $(find "$corpus" -type f | wc -l) in the corpus, $found"
  return $code
}
export -f run_one
printf '%s\n' "${targets[@]}" | xargs -P "$jobs" -I{} bash -c "run_one {} $seconds '$build'" || exit 1
