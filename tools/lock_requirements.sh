#!/usr/bin/env bash
# Rewrites requirements-{serve,test,cuda}.txt (exact versions, SHA-256 of every file) from the .in files. Run by hand when
# one changes.
set -euo pipefail
cd "$(dirname "$0")"
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
/usr/bin/python3 -m venv "$venv"
"$venv/bin/pip" install --quiet pip-tools==7.6.1
compile() {
  "$venv/bin/pip-compile" --quiet --generate-hashes --no-header --no-annotate --allow-unsafe --strip-extras \
    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --output-file "$2" "$1" "${@:3}"
}
compile requirements-test.in requirements-test.txt
# without_dependencies IN OUT: each line of IN stands for itself.
without_dependencies() {
  compile "$1" "$venv/all.txt"
  "$venv/bin/python" - "$1" "$venv/all.txt" >"$2" <<'PY'
import re, sys
wanted = {line.split("==")[0] for line in open(sys.argv[1]) if "==" in line and not line.startswith("#")}
for entry in re.split(r"\n(?=\S)", open(sys.argv[2]).read()):
    if entry.split("==")[0] in wanted:
        print(entry.rstrip())
PY
  rm "$venv/all.txt"
}
without_dependencies requirements-serve.in requirements-serve.txt
without_dependencies requirements-cuda.in requirements-cuda.txt
