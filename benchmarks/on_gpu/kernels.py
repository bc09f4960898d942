"""The tests with the marker `gpu`, in this process, so that a hang shows its stacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.on_gpu.part import NOTE, Part

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "unit"


class Outcomes:
    """A plugin of pytest that counts, and keeps what failed."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}
        self.seconds = 0.0
        self.failures: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds += report.duration
        if report.when == "call" or report.outcome != "passed":
            kind = "error" if report.failed and report.when != "call" else report.outcome
            self.counts[kind] += 1
        if report.failed:
            self.failures.append((report.nodeid, report.longreprtext.strip().splitlines()[-1]))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.counts["error"] += 1
            self.failures.append((report.nodeid, report.longreprtext.strip().splitlines()[-1]))


def run(part: Part) -> None:
    part.case("pytest -m gpu", kernels, part, seconds=140.0)


def kernels(part: Part) -> None:
    os.chdir(ROOT)
    outcomes = Outcomes()
    # Beside the tests' own output nothing of this machine's plugins and caches is of use here.
    options = [
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        "-o",
        "minversion=8.0",
        "--continue-on-collection-errors",
        str(TESTS),
    ]
    status = pytest.main(options, plugins=[outcomes])
    for name, message in outcomes.failures[:20]:
        part.check(False, f"{name.rpartition('/')[2]}: {message}", test=name)
    summary = ", ".join(f"{count} {kind}" for kind, count in outcomes.counts.items() if count)
    if status not in (0, 1, 5):
        part.check(False, f"pytest ended with status {int(status)}: {summary}", counts=outcomes.counts)
    elif outcomes.counts["passed"] or part.cuda:
        part.check(status == 0 and outcomes.counts["passed"] > 0, summary, counts=outcomes.counts)
    else:
        part.row(NOTE, f"{summary or 'none'}: they need a CUDA device", counts=outcomes.counts)
