#!/usr/bin/env bash
# Every check of the sources that is no test: formatting, the tree's rules, clang's analyses. Needs a configured
# build/release with its generated headers built (make test does both first). usage: tools/lint.sh [RESULTS]
# Prints 'lint NAME: passed|failed' for each and, with RESULTS, writes the same lines there.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-/dev/null}
: >"$results"
python=.venv/bin/python
failed=0

check() {
  local name=$1 outcome=passed began=$SECONDS
  shift
  "$@" 2>&1 || outcome=failed
  [ "$outcome" = passed ] || failed=1
  echo "lint $name: $outcome ($((SECONDS - began)) s)"
  echo "lint $name: $outcome" >>"$results"
}

format() {
  local file bad=0 count=0
  while read -r file; do
    count=$((count + 1))
    clang-format-16 --dry-run -Werror "$file" 2>/dev/null && continue
    echo "$file: not as clang-format writes it (make format)"
    bad=1
  done < <(git -c safe.directory='*' ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')
  [ "$count" -gt 0 ] || { echo "no sources found: is this a git checkout, and git installed?"; bad=1; }
  return "$bad"
}

check format format
for rule in layering isa sizes functions words; do check "$rule" "$python" tools/lint_tree.py "$rule"; done
check rules-tested "$python" -m pytest -q -p no:cacheprovider tests/tools
check thread-safety "$python" tools/lint_units.py thread-safety
check clang-tidy "$python" tools/lint_units.py tidy
exit "$failed"
