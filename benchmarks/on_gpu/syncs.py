"""How often a step waits for the device, and where: `benchmarks/syncs.py`, its rows by model, row and plan."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _record, syncs
from benchmarks.on_gpu.part import NOTE, Part


def run(part: Part) -> None:
    part.case("step", count, part, seconds=95.0)


def count(part: Part) -> None:
    """Run the script in this process, and take over what it writes."""
    with tempfile.TemporaryDirectory() as folder:
        _record.RESULTS = Path(folder)
        sys.argv = ["syncs", "--device", part.device, "--layers", "2" if part.small else "4", "--sites"]
        verdict = "as few as they may be"
        try:
            syncs.main()
        except SystemExit as ended:
            verdict = str(ended.code)
        (path,) = Path(folder).glob("*.json")
        for row in json.loads(path.read_text())["rows"]:
            report(part, row)
    for line in verdict.splitlines():
        part.check(verdict.startswith("as few"), line)


def report(part: Part, row: dict[str, Any]) -> None:
    name = f"{row['model']} {row['row']}, {row['contender']}{', checkpointing' * row['checkpointing']}"
    where = "; ".join(f"{count} {site}" for _, kind, site, count in row["sites"][:6] if kind == "read")
    part.row(NOTE, f"{name}: reads {row['forward']} + {row['backward']}, uploads {row['uploads']}; {where}", **row)
