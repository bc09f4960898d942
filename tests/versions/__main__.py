"""Run the fast suite in this environment and note its result: `python -m tests.versions {floor,newest} [PYTEST ARGS]`.

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


def count_outcomes(report: Path) -> dict[str, int]:
    """Tests by outcome, from pytest's junit report."""
    counts: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        counts["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETS)
    chosen, arguments = parser.parse_known_args()
    versions = check_environment(chosen.name)
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
