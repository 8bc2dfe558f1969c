#!/usr/bin/env bash
# Runs clients that people have, unmodified, against the daemon over the demo model, and schemathesis against the daemon
# over a fake engine. Prints each command and what it said; the exit code is 0 only when each did what it should.
# usage: tools/check_clients.sh [openai|grpc|langchain|openapi|lm-eval|guidellm]...   (default: all)
# Needs `make test`'s build and demo. Clients are installed into build/clients; guidellm's torch takes 6 GB there.
set -euo pipefail
cd "$(dirname "$0")/.."
parts=("$@")
[ "$#" -gt 0 ] || parts=(openai grpc langchain openapi lm-eval guidellm)
root=${MOED_CLIENTS:-build/clients}

# install VENV: what tools/requirements-clients.in has under [VENV].
install() {
  local venv=$root/$1 wanted
  wanted=$(sed -n "/^\[$1\]/,/^\[/{/^[a-z]/p}" tools/requirements-clients.in)
  [ "$(cat "$venv/stamp" 2>/dev/null)" = "$wanted" ] && return 0
  echo "clients: installing into $venv: ${wanted//$'\n'/ }"
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  # Word splitting is wanted: one requirement a word.
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $wanted
  echo "$wanted" >"$venv/stamp"
}

for part in "${parts[@]}"; do
  case $part in
    openai | grpc | langchain | openapi) install wire ;;
    lm-eval) install lm_eval ;;
    guidellm) install guidellm ;;
    *) echo "check_clients.sh: unknown part '$part'" >&2; exit 2 ;;
  esac
done
PYTHONDONTWRITEBYTECODE=1 .venv/bin/python tools/check_clients.py "$root" "${parts[@]}"
