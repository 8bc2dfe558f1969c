#!/usr/bin/env bash
# Whether `make cuda` builds something that a GPU of this machine runs, asked before 420 MB are downloaded for it. Exit
# code 0: the compute capabilities of its GPUs as CMake has them ("86;90"); 1: one line that says why not.
set -euo pipefail
driver_min=580     # the first that runs CUDA 13, of tools/requirements-cuda.txt
capability_min=80  # kMajorMin of kernels/cuda/requirements.cpp

no() { echo "$*"; exit 1; }
# Some versions say on stdout what goes wrong, so an answer is what looks like one.
ask() { { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null || true; } | grep -xE '[0-9]+(\.[0-9]+)+' || true; }

drivers=$(ask driver_version)
driver=${drivers%%$'\n'*}
[ -n "$driver" ] || no "no NVIDIA driver here"
[ "${driver%%.*}" -ge "$driver_min" ] ||
  no "the NVIDIA driver $driver does not run CUDA 13: $driver_min or later is needed"
capabilities=$(ask compute_cap)
wanted=()
for capability in $(sort -Vu <<<"$capabilities"); do
  if [ "${capability/./}" -ge "$capability_min" ]; then wanted+=("${capability/./}"); fi
done
[ "${#wanted[@]}" -gt 0 ] ||
  no "no GPU here has compute capability 8.0 or later (nvidia-smi says: ${capabilities:-nothing})"
(IFS=';' && echo "${wanted[*]}")
