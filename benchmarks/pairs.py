"""Two sequences in flight cost no more: activations, CPU time and gathers of a step on 2 ranks.

    python -m benchmarks pairs

One packed row of two equal parts on 2 gloo ranks that share it (sp=2), with and without activation checkpointing:

    plain   the full row
    pairs   its halves, `overlap=pairs`
    turns   its halves as two micro-batches, one after the other

Gradients of parameters are counted apart: both halves have one of a weight, until they are added up. What is hidden
of the link cannot be seen here, since gloo's threads and the ranks share the cores. Exit status 1 if the halves in
flight keep or need more than `--tolerance` times the row's activations, or if the loss differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks._memory import MemoryLog
from benchmarks._record import measure, quantiles, record
from benchmarks._rows import packed_row
from benchmarks.activation_memory import WARM_UP, build
from hf_veomni import prepare_omni, run_pair
from hf_veomni.comm.gather import ALL_GATHER

WAYS = ("plain", "pairs", "turns")
LOSS_TOLERANCE = 1e-5


def train(model: Any, way: str, batch: dict[str, Tensor], log: MemoryLog | None = None) -> float:
    """One step; its loss, over the targets of the full row."""
    middle = batch["input_ids"].shape[1] // 2
    items = (batch["labels"][:, 1:] != -100).sum()
    halves = [{n: x[:, part] for n, x in batch.items()} for part in (slice(None, middle), slice(middle, None))]

    def compute(part: dict[str, Tensor]) -> Tensor:
        return model(**part, num_items_in_batch=items, use_cache=False).loss

    if way == "turns":
        value = 0.0
        for half in halves:
            loss = compute(half)
            loss.backward()
            value += float(loss.detach())
    else:
        loss = compute(batch) if way == "plain" else torch.stack(run_pair(compute, *halves)).sum()
        if log is not None:
            log.label_parts_of_gradients(loss)  # of two halves, which are added up
            log.mark("loss")
        loss.backward()
        value = float(loss.detach())
    model.zero_grad()
    return value


def count_gathers(function: Any) -> int:
    counts: Counter[str] = Counter()
    stock = getattr(dist, ALL_GATHER)

    def counting(*args: Any, **kwargs: Any) -> Any:
        counts["gathers"] += 1
        return stock(*args, **kwargs)

    setattr(dist, ALL_GATHER, counting)
    try:
        function()
    finally:
        setattr(dist, ALL_GATHER, stock)
    return counts["gathers"]


def measure_way(model: Any, way: str, batch: dict[str, Tensor], repeats: int) -> dict[str, Any]:
    step = partial(train, model, way, batch)
    found: dict[str, Any] = {"loss": step(), "gathers": count_gathers(step)}
    found["cpu_seconds"] = quantiles(measure(step, repeats, time.process_time))
    if way != "turns":
        log = MemoryLog()
        log.label_gradients(model)
        with log:
            train(model, way, batch, log)
        found |= {"held": log.at("loss", "activation"), "peak": log.peak("activation")[0]}
        found["peak_with_gradients"] = log.peak("activation", "gradient")[0]
    return found


def work(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batch = packed_row([options.tokens // 2] * 2, options.vocab)
    found: dict[str, Any] = {}
    for way in WAYS:
        model = prepare_omni(build(options), "sp=2,overlap=pairs" if way == "pairs" else "sp=2")
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable()
            train(model, way, packed_row([WARM_UP] * 2, options.vocab))
            found.setdefault(str(checkpointing), {})[way] = measure_way(model, way, batch, options.repeats)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def compare(row: dict[str, Any], tolerance: float) -> list[str]:
    """Add the ratios of pairs to the full row, and say which are off."""
    plain, pairs, off = row["plain"], row["pairs"], []
    where = f"checkpointing={row['checkpointing']}"
    for what in ("held", "peak", "peak_with_gradients"):
        ratio = row[f"{what}_ratio"] = round(pairs[what] / plain[what], 4)
        if ratio > tolerance and what in ("held", "peak"):
            off.append(f"{what} activations of two halves are {ratio:.3f} of the full row's at {where}")
    for way in WAYS:
        error = abs(row[way]["loss"] - plain["loss"]) / abs(plain["loss"])
        if not error <= LOSS_TOLERANCE:
            off.append(f"the loss of {way} differs by {error:.1e} at {where}")
    row["cpu_ratio"] = round(pairs["cpu_seconds"]["p50"] / plain["cpu_seconds"]["p50"], 4)
    return off


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("tokens", 4096), ("layers", 4), ("hidden", 512), ("heads", 8), ("kv-heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32"], default="float32")
    parser.add_argument("--tolerance", type=float, default=1.02)
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the ranks that are started below
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, options), nprocs=2)
        found = json.loads(Path(folder, "0.json").read_text())
    shape = {key: value for key, value in vars(options).items() if key != "tolerance"}
    rows = [{"device": "cpu", "checkpointing": key == "True", **shape, **ways} for key, ways in found.items()]
    off = [text for row in rows for text in compare(row, options.tolerance)]
    for row in rows:
        gathers = ", ".join(f"{way} {row[way]['gathers']}" for way in WAYS)
        print(
            f"checkpointing={row['checkpointing']!s:5}  pairs against the full row: held x {row['held_ratio']:.3f}, "
            f"peak x {row['peak_ratio']:.3f}, with gradients x {row['peak_with_gradients_ratio']:.3f}, "
            f"CPU time x {row['cpu_ratio']:.3f}; gathers: {gathers}"
        )
    record("pairs", rows, plan="sp=2,overlap=pairs")
    if off:
        sys.exit("\n".join(off))


if __name__ == "__main__":
    main()
