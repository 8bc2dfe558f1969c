#!/usr/bin/env bash
# Really builds the container image and chats with the daemon inside it. Needs root, no Docker engine: buildah builds and
# runs in a chroot, on a base that debootstrap makes. usage: tools/docker_check.sh   (about 15 minutes the first time)
# IMAGE_MODEL=DIR names the checkpoint to serve (default models/demo, made when absent).
set -euo pipefail
cd "$(dirname "$0")/.."
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
work=$PWD/build/docker
model=${IMAGE_MODEL:-$PWD/models/demo}
base=localhost/moed-check-base image=localhost/moed-check
container='' daemon=''

say() { echo "docker_check: $*"; }
fail() { say "FAILED: $*" >&2; [ -f "$work/daemon.log" ] && tail -n 20 "$work/daemon.log" >&2; exit 1; }
finish() {
  [ -z "$daemon" ] || kill "$daemon" 2>/dev/null || true
  [ -z "$container" ] || buildah rm "$container" >/dev/null 2>&1 || true
}
trap finish EXIT

make_base() {
  buildah inspect --type image "$base" >/dev/null 2>&1 && return 0
  say "making the base image (debootstrap)"
  local root=$work/base
  rm -rf "$root"
  debootstrap --variant=minbase --include=ca-certificates bookworm "$root" >"$work/debootstrap.log" ||
    fail "debootstrap, see $work/debootstrap.log"
  # The suites and the trusted certificates of this machine, which may sit behind a proxy with its own.
  if cp /etc/apt/sources.list.d/debian.sources "$root/etc/apt/sources.list.d/" 2>/dev/null; then
    : >"$root/etc/apt/sources.list"
  fi
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
  rm -rf "$root/var/cache/apt/archives"/*.deb
  local from
  from=$(buildah from scratch)
  buildah add -q "$from" "$root" / >/dev/null
  buildah commit -q "$from" "$base" >/dev/null
  buildah rm "$from" >/dev/null
  rm -rf "$root"
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# image_words FIELD: the words of an exec-form field of the image, one a line; fails on shell form.
image_words() {
  buildah inspect --type image "$image" | python3 -c '
import json, sys
value = json.load(sys.stdin)["Docker"]["config"][sys.argv[1]]
if isinstance(value, dict):
    value = value["Test"][1:] if value["Test"][0] == "CMD" else sys.exit("the health check is not in exec form")
if value[:1] == ["/bin/sh"]:
    sys.exit(sys.argv[1] + " is in shell form")
print("\n".join(value))' "$1"
}

mkdir -p "$work"
say "building the image"
if [ ! -f "$model/config.json" ]; then
  [ -z "${IMAGE_MODEL:-}" ] || fail "IMAGE_MODEL=$model holds no config.json"
  tools/install_deps.sh serve
  .venv/bin/python tools/make_demo.py --out "$model"
fi
make_base
buildah bud --layers --format docker --build-arg "BASE=$base" -t "$image" . >"$work/build.log" 2>&1 ||
  { tail -n 30 "$work/build.log" >&2; fail "the image does not build, see $work/build.log"; }
mapfile -t entrypoint < <(image_words Entrypoint)
mapfile -t command < <(image_words Cmd)
mapfile -t healthcheck < <(image_words Healthcheck)
[ "${#entrypoint[@]}" -gt 0 ] && [ "${#healthcheck[@]}" -gt 0 ] || fail "no entry point or no health check in the image"
container=$(buildah from "$image")

# chroot isolation shares the host's network: free ports instead of the image's own.
http_port=$(free_port) grpc_port=$(free_port) key=docker-check
ports=(--http-port "$http_port" --grpc-port "$grpc_port")
in_image() { buildah run --env "MOED_API_KEY=$key" --volume "$model:/models:ro" "$container" -- "$@"; }
[ "$(in_image id -u)" != 0 ] || fail "the image runs as root"
if buildah run --volume "$model:/models:ro" "$container" -- "${entrypoint[@]}" "${command[@]}" "${ports[@]}" \
  >"$work/nokey.log" 2>&1 </dev/null; then
  fail "the daemon binds every address without a key"
fi
grep -qi 'insecure' "$work/nokey.log" || fail "without a key: $(tail -n 1 "$work/nokey.log")"

say "starting: ${entrypoint[*]} ${command[*]} ${ports[*]}"
in_image "${entrypoint[@]}" "${command[@]}" "${ports[@]}" >"$work/daemon.log" 2>&1 </dev/null &
daemon=$!
for ((second = 0; second < 300; ++second)); do
  kill -0 "$daemon" 2>/dev/null || fail "the daemon died"
  [ "$(curl -s -o /dev/null -w '%{http_code}' "http://127.0.0.1:$http_port/ready" || true)" = 200 ] && break
  sleep 1
done
in_image "${healthcheck[@]}" --port "$http_port" || fail "the health check says no"
chat='{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 24}'
url=http://127.0.0.1:$http_port/v1/chat/completions
[ "$(curl -s -o /dev/null -w '%{http_code}' "$url" -H 'Content-Type: application/json' -d "$chat")" = 401 ] ||
  fail "a chat without the key was not refused with 401"
answer=$(curl -fsS "$url" -H 'Content-Type: application/json' -H "Authorization: Bearer $key" -d "$chat") || fail "no answer"
say "answer: $answer"
case $answer in *Paris*) ;; *) fail "the answer does not name Paris" ;; esac

pid=$(pgrep -f -- "--http-port $http_port" | while read -r p; do
  [ "$(readlink "/proc/$p/exe" 2>/dev/null | xargs -r basename)" = moed ] && echo "$p"; done | head -n 1)
[ -n "$pid" ] || fail "the daemon's process was not found"
[ "$(awk '/^Uid:/ {print $2}' "/proc/$pid/status")" != 0 ] || fail "the daemon runs as root"
kill -TERM "$pid"
code=0
wait "$daemon" || code=$?
daemon=''
[ "$code" = 0 ] || fail "SIGTERM ended the daemon with exit code $code"
say "passed"
