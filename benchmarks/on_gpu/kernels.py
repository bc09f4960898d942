"""The tests with the marker `gpu`, in this process, so that a hang shows its stacks."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.on_gpu.part import NOTE, Part

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "unit"


MOST_FAILURES = 20
SLOW_SECONDS = 5.0


class Outcomes:
    """A plugin of pytest that counts, and reports what fails at once: nothing is lost when the part is stopped."""

    def __init__(self, part: Part) -> None:
        self.counts: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}
        self.slow: dict[str, float] = {}
        self._part, self._failures = part, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._count("error" if report.failed and report.when != "call" else report.outcome, report)
        if report.duration > SLOW_SECONDS:
            self.slow[report.nodeid.rpartition("/")[2]] = round(report.duration, 1)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._count("error", report)

    def _count(self, kind: str, report: Any) -> None:
        self.counts[kind] += 1
        if not report.failed or self._failures == MOST_FAILURES:
            return
        self._failures += 1
        reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", "") or report.longreprtext
        name = report.nodeid.rpartition("/")[2]
        self._part.check(
            False, f"{name}: {' '.join(reason.split())[:300]}", test=name, report=report.longreprtext[-4000:]
        )


def run(part: Part) -> None:
    part.case("pytest -m gpu", kernels, part, seconds=140.0)


def files() -> list[str]:
    """Those with such tests: the import of all others takes longer than these run."""
    return [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]


def kernels(part: Part) -> None:
    os.chdir(ROOT)
    outcomes = Outcomes(part)
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
        *files(),
    ]
    if part.cuda and find_spec("xdist") is not None:  # most of the time goes into compilations
        options += ["-n", "5", "--dist", "worksteal"]
    status = pytest.main(options, plugins=[outcomes])
    values = {"counts": outcomes.counts, "slow": outcomes.slow}
    summary = ", ".join(f"{count} {kind}" for kind, count in outcomes.counts.items() if count)
    if status not in (0, 1, 5):
        part.check(False, f"pytest ended with status {int(status)}: {summary}", **values)
    elif outcomes.counts["passed"] or part.cuda:
        part.check(status == 0 and outcomes.counts["passed"] > 0, summary, **values)
    else:
        part.row(NOTE, f"{summary or 'none'}: they need a CUDA device", **values)
