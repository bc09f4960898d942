"""Make up plans, yaml files, recipes, samples and batches at random, and see that each works or is refused by name.

    python -m tests.fuzz --cases 3000     # writes benchmarks/results/fuzz_cpu.json

Exit status 1 if a case neither worked nor was refused by an error of ours. Damaged checkpoint folders have a fuzz of
their own (`tests/unit/checkpoint/test_fuzz.py`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks._record import record
from tests.fuzz.cases import CASES, attempt


def fuzz(name: str, count: int, number: int) -> dict[str, Any]:
    """Run `count` cases of a kind. Returns how many worked and were refused, and one that did neither."""
    strategies, function, _ = CASES[name]
    tally: Counter[str] = Counter()
    begin = time.monotonic()

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # not made smaller, which takes minutes where a case trains
    )
    @given(st.tuples(*strategies))
    def run(arguments: tuple[Any, ...]) -> None:
        tally["cases"] += 1
        attempt(tally, lambda: function(*arguments))

    fault = None
    checked: Callable[[], None] = run
    try:
        checked()
    except BaseException as error:  # hypothesis groups several
        parts = getattr(error, "exceptions", [error])
        fault = "\n".join("\n".join([str(part), *getattr(part, "__notes__", [])]) for part in parts)[:5000]
    return {
        "kind": name,
        "cases": tally["cases"],
        "worked": tally["worked"],
        "refused": tally["refused"],
        "faults": int(fault is not None),
        "seconds": round(time.monotonic() - begin, 1),
        **({"fault": fault} if fault else {}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=3000, help="over all kinds")
    parser.add_argument("--kinds", default="", help="only those whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="write no file")
    options = parser.parse_args()
    rows = []
    for name, (_, _, share) in CASES.items():
        if options.kinds in name:
            rows.append(fuzz(name, max(1, options.cases * share // 100), options.seed))
            print(rows[-1], flush=True)
    total = {key: sum(row[key] for row in rows) for key in ("cases", "worked", "refused", "faults")}
    print(f"in all: {total}")
    if not options.no_record:
        record("fuzz", [{"kind": "all", **total}, *rows])
    return 1 if total["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
