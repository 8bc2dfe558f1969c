#!/usr/bin/env python3
"""Counts the results of lint, ctest and end to end. usage: count_results.py FOLDER ctest=CODE e2e=CODE [cuda=CODE]

Reads FOLDER/lint.txt and cuda.txt ('lint NAME: passed|failed'), ctest.xml and e2e.xml (JUnit). A part without a report, without a
single test, or whose exit code says failure while its report names none counts as one failure. The last line is
'N passed, N failed'; exits 1 if anything failed."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def count_lines(path):
    lines = path.read_text().splitlines() if path.is_file() else []
    failed = [line.split(":")[0] for line in lines if not line.endswith(": passed")]
    return len(lines) - len(failed), failed, 0


def count_junit(path):
    """(passed, names of the failed, number of skipped)"""
    passed, failed, skipped = 0, [], 0
    if not path.is_file():
        return passed, failed, skipped
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None or case.get("status") == "fail":
            failed.append(f"{case.get('classname')} {case.get('name')}")
        elif case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped


def main(folder, codes):
    parts = {"lint": count_lines(folder / "lint.txt")}
    for part, code in codes.items():
        text = folder / f"{part}.txt"
        passed, failed, skipped = count_lines(text) if text.is_file() else count_junit(folder / f"{part}.xml")
        if code and not failed:
            failed = [f"{part} itself (exit code {code})"]
        parts[part] = passed, failed, skipped
    for part, (passed, failed, skipped) in parts.items():
        if not passed and not failed:
            failed.append(f"{part} itself (no results)")
        print(f"{part}: {passed} passed, {len(failed)} failed, {skipped} skipped")
        for name in failed:
            print(f"  failed: {name}")
    num_failed = sum(len(failed) for _, failed, _ in parts.values())
    print(f"{sum(passed for passed, _, _ in parts.values())} passed, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), {part: int(code) for part, code in (arg.split("=") for arg in sys.argv[2:])}))
