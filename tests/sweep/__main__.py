"""Sweep all families: `python -m tests.sweep [--only NAME] [--shard I/N] [--output PATH] [--update] [--commit]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from tests.ranks.pool import RankPool, RanksFailed  # noqa: E402
from tests.sweep.family import ROOT, Record, sweep_family  # noqa: E402
from tests.sweep.training import PLANS, compare_logs, omni_logs, stock_logs  # noqa: E402

TIMEOUT = 120.0  # seconds a family may take, in fp32 and in fp64


def walk_one(pool: RankPool, model_type: str, plan: str = "sp=2") -> dict[str, Any]:
    """The worst record of all ranks, and what OmniTrainer logs of a family that works and has a loss of its own."""
    from dataclasses import asdict

    try:
        found = pool.run(sweep_family, model_type, plan, timeout=TIMEOUT)
    except RanksFailed:
        from tests.sweep import tiny

        record = Record(model_type, folder=tiny.folder_of(model_type))
        return asdict(record.end("crashes", "a rank hangs or dies"))
    order = ["wrong", "crashes", "refused", "unbuildable", "not_applicable", "works"]
    worst = min(found, key=lambda r: order.index(r["outcome"]))
    if worst["outcome"] == "works":
        begin = time.monotonic()
        worst["trainer"] = train_one(pool, worst)
        worst["seconds"] = round(worst["seconds"] + time.monotonic() - begin, 2)
        if worst["trainer"].startswith("wrong"):
            worst["outcome"], worst["reason"] = "wrong", f"OmniTrainer: {worst['trainer']}"
    return worst


def train_one(pool: RankPool, record: dict[str, Any]) -> str:
    """Works under all plans, or what is wrong or refused under one."""
    if record["loss"] != "model" or record["kind"] == "base":
        return "does not apply"
    name = record["model_type"]
    try:
        wanted = stock_logs(name)
    except Exception as error:
        return f"the stock Trainer does not take it: {type(error).__name__}: {str(error)[:150]}"
    for plan in PLANS:
        try:
            found = pool.run(omni_logs, name, plan, record["rule"], timeout=TIMEOUT)
        except RanksFailed as error:
            return f"wrong: {plan}: a rank fails: {str(error).strip().splitlines()[-1][:150]}"
        for outcome in {compare_logs(logs, wanted) for logs in found} - {"works"}:
            return f"wrong: {plan}: {outcome[7:]}" if outcome.startswith("wrong: ") else f"{plan}: {outcome}"
    return "works"


def sweep(names: list[str], plan: str, output: Path | None, known: dict[str, Any]) -> dict[str, Any]:
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


def commit(found: dict[str, Any], plan: str, again: list[str]) -> None:
    """Write what the package and the documentation show; `again`: swept later than the rest."""
    import torch
    import transformers

    from hf_veomni.support.matrix import parse_matrix
    from hf_veomni.support.render import render_markdown

    content = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]},
        "date": date.today().isoformat(),
        "plan": plan,
        "again": again,
        "families": {name: found[name] for name in sorted(found)},
    }
    (ROOT / "hf_veomni/support/families.json").write_text(json.dumps(content, indent=1) + "\n")
    (ROOT / "docs/support.md").write_text(render_markdown(parse_matrix(content)))


def main() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # without what is registered

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="model types")
    parser.add_argument("--shard", default="0/1", help="part I of N")
    parser.add_argument("--output", type=Path, help="json to write, and to go on from")
    parser.add_argument("--plan", default="sp=2")
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="results of other shards")
    parser.add_argument("--update", action="store_true", help="the rest from the package's json, which then says so")
    parser.add_argument("--commit", action="store_true", help="write the package's json and docs/support.md")
    args = parser.parse_args()
    again: list[str] = []
    part, parts = map(int, args.shard.split("/"))
    known: dict[str, Any] = {}
    for path in [*args.merge, *([args.output] if args.output and args.output.exists() else [])]:
        known |= json.loads(path.read_text())
    if args.update:
        package = json.loads((ROOT / "hf_veomni/support/families.json").read_text())
        again = sorted({*package.get("again", ()), *known, *(args.only or ())})
        known = package["families"] | known
    names = [n for i, n in enumerate(sorted(CONFIG_MAPPING_NAMES)) if i % parts == part and n not in known]
    found = sweep(args.only or names, args.plan, args.output, known)
    if args.commit:
        if missing := sorted(set(CONFIG_MAPPING_NAMES) - found.keys()):
            sys.exit(f"{len(missing)} model types are missing: {', '.join(missing[:5])} ...")
        commit(found, args.plan, again)
    print(Counter(r["outcome"] for r in found.values()))
    if wrong := [name for name, r in found.items() if r["outcome"] == "wrong"]:
        sys.exit(f"WRONG: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
