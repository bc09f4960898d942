"""Kill training runs of two processes again and again, at random moments and while they save, and restart them.

    python -m tests.soak --kills 1000 --seconds 3600     # all variants; writes benchmarks/results/soak_cpu.json

Each run must end with the weights and the optimizer's state of an undisturbed one, bit by bit, and each start must
begin at the newest checkpoint that was complete. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, record
from tests.soak.driver import Tally, soak
from tests.soak.training import Variant

VARIANTS = [
    Variant(*choice) for choice in itertools.product((False, True), (False, True), ("plain", "sharded", "async"))
]
FILE = "soak"
COUNTED = [field.name for field in fields(Tally) if field.name != "notes"]


def earlier() -> list[dict[str, Any]]:
    """The rows of the file, each with the commit and the date of its run."""
    stored = json.loads((RESULTS / f"{FILE}_cpu.json").read_text())
    told = {name: stored[name] for name in ("commit", "date")}
    return [told | row for row in stored["rows"] if row["variant"] != "all"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="over all variants")
    parser.add_argument("--seconds", type=float, default=3600, help="kill no more after so long")
    parser.add_argument("--variants", default="", help="only those whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="write no file")
    parser.add_argument("--add", action="store_true", help="count in what the file has of earlier runs, which stays")
    options = parser.parse_args()
    variants = [variant for variant in VARIANTS if options.variants in variant.name]
    begin, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        for number, variant in enumerate(variants):
            left = len(variants) - number
            kills = round((options.kills - sum(row["kills"] for row in rows)) / left)
            until = time.monotonic() + (begin + options.seconds - time.monotonic()) / left
            tally = soak(variant, Path(folder) / variant.name, kills, until, options.seed)
            rows.append({"variant": variant.name, "plan": variant.plan, **asdict(tally)})
            print({name: value for name, value in rows[-1].items() if value}, flush=True)
    rows = [*(earlier() if options.add else []), *rows]
    total = {name: round(sum(row[name] for row in rows), 1) for name in COUNTED}
    print(f"in all: {total}")
    if not options.no_record:
        record(FILE, [{"variant": "all", **total}, *rows])
    sound = not (total["lost"] or total["wrong"] or total["failed"])
    return 0 if sound and total["kills"] and total["during_save"] * 3 >= total["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
