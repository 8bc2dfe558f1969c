#!/usr/bin/env bash
# cargo's RUSTC_WRAPPER for fuzzing: what reads templates and texts reports its branches to libFuzzer. Flags for all crates
# would reach build scripts too, which do not link with it. AddressSanitizer, and so cargo fuzz, takes a nightly rustc.
case " $* " in
  *" --crate-name minijinja "* | *" --crate-name minijinja_contrib "* | *" --crate-name tokenizers "* | \
    *" --crate-name fancy_regex "* | *" --crate-name moed_text "*)
    exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=3 \
      -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
      -Cllvm-args=-sanitizer-coverage-trace-compares
    ;;
esac
exec "$@"
