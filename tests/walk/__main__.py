"""Walk all families: `python -m tests.walk [--only NAME ...] [--shard I/N] [--output PATH]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from tests.ranks.pool import RankPool, RanksFailed  # noqa: E402
from tests.walk.family import Record, walk_family  # noqa: E402

TIMEOUT = 60.0  # seconds a family may take


def walk_one(pool: RankPool, model_type: str, plan: str = "sp=2") -> dict[str, Any]:
    """The worst record of all ranks."""
    from dataclasses import asdict

    try:
        found = pool.run(walk_family, model_type, plan, timeout=TIMEOUT)
    except RanksFailed as error:
        from tests.walk import tiny

        record = Record(model_type, folder=tiny.folder_of(model_type))
        return asdict(record.end("crashes", "hangs or dies: " + str(error)[-1500:]))
    order = ["wrong", "crashes", "refused", "unbuildable", "not_applicable", "works"]
    return min(found, key=lambda r: order.index(r["outcome"]))


def walk(names: list[str], plan: str, output: Path | None, known: dict[str, Any]) -> dict[str, Any]:
    from rich.progress import track

    pool = RankPool(2)
    found = dict(known)
    try:
        for name in track(names, description="families", disable=not sys.stderr.isatty()):
            found[name] = walk_one(pool, name, plan)
            r = found[name]
            print(f"{name:32} {r['outcome']:14} {r['seconds']:5.1f} s  {r['reason'][:150]}", flush=True)
            if output is not None:
                output.write_text(json.dumps(found, indent=1))
    finally:
        pool.close()
    return found


def main() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="model types")
    parser.add_argument("--shard", default="0/1", help="part I of N")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plan", default="sp=2")
    args = parser.parse_args()
    part, parts = map(int, args.shard.split("/"))
    names = [n for i, n in enumerate(sorted(CONFIG_MAPPING)) if i % parts == part]
    if args.only:
        names = args.only
    known = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    found = walk(names, args.plan, args.output, known)
    print(Counter(r["outcome"] for r in found.values()))


if __name__ == "__main__":
    main()
