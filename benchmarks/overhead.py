"""What `prepare_omni` costs where it has nothing to do: a step at sp = ep = 1 against FSDP2 by hand, on 2 ranks.

    python -m benchmarks overhead

The same weights and the same row in both, which take turns in blocks of the same processes; gloo ranks on the CPU:

    plain      `fully_shard` on each layer and on the model, transformers' own forward and loss
    prepared   `prepare_omni(model, "dp_shard=2")`; `chunked_loss=False` in a second form, with the same loss as plain

Seconds are the CPU time of a rank. Exit status 1 if the loss differs, or if the prepared model with the same loss
takes more than `--tolerance` times plain's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks._record import quantiles, record
from benchmarks.activation_memory import build
from hf_veomni import prepare_omni

RANKS = 2
LOSS_TOLERANCE = 1e-5


def plain(options: argparse.Namespace) -> Any:
    model: Any = build(options)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


CONTENDERS = {
    "plain": plain,
    "prepared": lambda options: prepare_omni(build(options), "dp_shard=2"),
    "prepared, same loss": lambda options: prepare_omni(build(options), "dp_shard=2", chunked_loss=False),
}


def train(model: Any, batch: dict[str, Tensor]) -> float:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    model.zero_grad()
    return float(loss.detach())


def work(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    ids = torch.randint(0, options.vocab, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    steps = {
        name: partial(train, make(options), {"input_ids": ids, "labels": ids}) for name, make in CONTENDERS.items()
    }
    found: dict[str, Any] = {name: {"loss": step(), "seconds": []} for name, step in steps.items()}
    for _ in range(options.rounds):
        for name, step in steps.items():
            begin = time.process_time()
            for _ in range(options.steps):
                step()
            found[name]["seconds"].append((time.process_time() - begin) / options.steps)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def compare(rows: list[dict[str, Any]], tolerance: float) -> list[str]:
    """Add the ratios to plain, and say what is off."""
    off, first = [], rows[0]
    for row in rows:
        row["over_plain"] = quantiles([a / b for a, b in zip(row["rounds"], first["rounds"], strict=True)])
        if not abs(row["loss"] - first["loss"]) <= LOSS_TOLERANCE * abs(first["loss"]):
            off.append(f"the loss of {row['contender']} is {row['loss']}, not {first['loss']}")
        if row["contender"] == "prepared, same loss" and row["over_plain"]["p50"] > tolerance:
            off.append(f"a prepared model takes {row['over_plain']['p50']:.3f} times as long as plain FSDP2")
    return off


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (("tokens", 1024), ("layers", 4), ("hidden", 512), ("heads", 8), ("kv-heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="of a contender in a round")
    parser.add_argument("--dtype", choices=["float32"], default="float32")
    parser.add_argument("--tolerance", type=float, default=1.02)
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the ranks that are started below
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, options), nprocs=RANKS)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]
    shape = {key: value for key, value in vars(options).items() if key != "tolerance"}
    rows = []
    for name in CONTENDERS:
        rounds = [sum(both) / RANKS for both in zip(*(rank[name]["seconds"] for rank in ranks), strict=True)]
        rows.append({"contender": name, **shape, "loss": ranks[0][name]["loss"], "rounds": rounds})
        rows[-1]["seconds"] = quantiles(rounds)
    off = compare(rows, options.tolerance)
    for row in rows:
        over = row["over_plain"]
        print(
            f"{row['contender']:20s} {row['seconds']['p50']:.3f} s of CPU, x {over['p50']:.3f} of plain's", flush=True
        )
    record("overhead", rows, plan="dp_shard=2")
    if off:
        sys.exit("\n".join(off))


if __name__ == "__main__":
    main()
