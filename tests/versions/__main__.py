"""Run the fast suite in this environment and note its result: `python -m tests.versions {floor,newest} [PYTEST ARGS]`.

With `--again` only what failed in the noted run is run once more, in a process of its own: on a loaded machine a time
limit can strike a test that passes alone. What passes then counts as passed, and its name is noted under "again".

The environment must hold what `constraints-NAME.txt` pins; `make test-floor` and `make test-newest` build it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.versions import RESULTS, ROOT, SETS, read_pins, read_results


def check_environment(name: str) -> dict[str, str]:
    """The installed versions of what the set pins.

    Raises:
        SystemExit: the environment is not that of the set.
    """
    found = {}
    for package, pinned in read_pins(ROOT / f"constraints-{name}.txt").items():
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            found[package] = "missing"
        if found[package] != pinned:
            sys.exit(
                f"{package} is {found[package]} and constraints-{name}.txt pins {pinned}: use `make test-{name}`."
            )
    return found


def names_of(report: Path) -> dict[str, str]:
    """Outcome by test, from pytest's junit report."""
    return {
        f"{case.get('classname')}::{case.get('name')}": _outcome(case)
        for case in ElementTree.parse(report).iter("testcase")
    }


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def count_outcomes(report: Path) -> dict[str, int]:
    """Tests by outcome, from pytest's junit report."""
    counts: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    counts.update(names_of(report).values())
    return dict(counts)


def run_again(name: str) -> None:
    """Run what failed in the noted run of set `name` once more, and note what passes now."""
    entry = read_results()[name]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        selected = ["-m", "not slow and not everyday", "--last-failed", "--last-failed-no-failures=none"]
        subprocess.run([sys.executable, "-m", "pytest", *selected, f"--junitxml={report}"], cwd=ROOT)
        outcomes = names_of(report)
    if len(outcomes) != entry["counts"]["failed"]:
        sys.exit(f"{len(outcomes)} tests were run again, but {entry['counts']['failed']} had failed: run all anew.")
    passed = sorted(test for test, outcome in outcomes.items() if outcome == "passed")
    entry["counts"]["passed"] += len(passed)
    entry["counts"]["failed"] -= len(passed)
    entry["again"] = sorted({*entry.get("again", ()), *passed})
    RESULTS.write_text(json.dumps(read_results() | {name: entry}, indent=1, sort_keys=True) + "\n")
    print(name, entry["counts"], "again:", *passed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETS)
    parser.add_argument("--again", action="store_true", help="only what failed in the noted run")
    chosen, arguments = parser.parse_known_args()
    versions = check_environment(chosen.name)
    if chosen.again:
        run_again(chosen.name)
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "not slow and not everyday", f"--junitxml={report}"]
        code = subprocess.run([*command, *arguments], cwd=ROOT).returncode
        if code not in (0, 1):  # interrupted, or nothing was collected
            sys.exit(code)
        counts = count_outcomes(report)
    entry: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": versions,
        "counts": counts,
        "seconds": round(time.monotonic() - start),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "date": date.today().isoformat(),
    }
    print(chosen.name, entry["python"], counts, f"{entry['seconds']} s")
    if arguments:
        print("Only a part was run, or in another way: the result is not noted.")
    else:
        RESULTS.write_text(json.dumps(read_results() | {chosen.name: entry}, indent=1, sort_keys=True) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
