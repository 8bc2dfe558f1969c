#!/usr/bin/env bash
# What `make gpu-bundle` does: build/moed-gpu.tar.gz with all that tools/gpu_check.sh needs on a machine that has a
# driver, nvcc, CMake and a C++20 compiler but neither a network nor any library of ours: engine, kernels, ring and
# planner with their tests, the header libraries, GoogleTest's sources. usage: tools/gpu_bundle.sh [ARCHIVE]
set -euo pipefail
cd "$(dirname "$0")/.."
archive=$(realpath -m "${1:-build/moed-gpu.tar.gz}")
limit_bytes=$((64 << 20))
include=${MOED_BUNDLE_INCLUDE:-/usr/include}
googletest=${MOED_BUNDLE_GOOGLETEST:-/usr/src/googletest}

fail() { echo "gpu_bundle.sh: $*" >&2; exit 1; }
for needed in "$include"/{spdlog,fmt,nlohmann,CLI,toml++} "$googletest"/googletest; do
  [ -e "$needed" ] || fail "$needed is not there (tools/install_deps.sh build)"
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/moed-gpu
mkdir -p "$root/third_party/include" "$root/third_party/licenses"
# Untracked files come along, so that what is measured is what lies here.
git -c safe.directory='*' ls-files -co --exclude-standard -- CMakeLists.txt cmake base kernels model offload plan engine \
  scheduler server tests/CMakeLists.txt tests/{base,kernels,model,offload,plan,engine,scheduler,support,gpu,golden} \
  deploy/machines tools/gpu_check.sh |
  while IFS= read -r name; do if [ -f "$name" ]; then echo "$name"; fi; done |
  tar -cf - -T - | tar -xf - -C "$root"
cp -r "$include"/{spdlog,fmt,nlohmann,CLI,toml++} "$root/third_party/include/"
cp -r "$googletest" "$root/third_party/googletest"
for package in libspdlog-dev libfmt-dev nlohmann-json3-dev libcli11-dev libtomlplusplus-dev googletest; do
  if [ -e "/usr/share/doc/$package/copyright" ]; then
    cp -L "/usr/share/doc/$package/copyright" "$root/third_party/licenses/$package"
  fi
done
{
  git -c safe.directory='*' rev-parse --short=12 HEAD
  if [ -n "$(git -c safe.directory='*' status --porcelain)" ]; then echo "with changes that are not committed"; fi
} >"$root/VERSION"

mkdir -p "$(dirname "$archive")"
tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner -czf "$archive" moed-gpu
bytes=$(stat -c %s "$archive")
[ "$bytes" -lt "$limit_bytes" ] || fail "$archive is $bytes bytes large, at most $limit_bytes may be"
echo "$archive: $bytes bytes; on the machine with a GPU: tools/gpu_check.sh $(basename "$archive")"
