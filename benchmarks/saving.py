"""Seconds that training stops for a checkpoint: plain, sharded, asynchronous, and the stock Trainer, in one run.

    python -m benchmarks saving        # AdamW on a Llama of 98M parameters: 1.2 GB a checkpoint

    stock      Trainer in one process; its files are in the page cache when it goes on, not on the disk
    plain      gathered weights, the optimizer's state sharded; on the disk, with checksums
    sharded    each rank writes what it owns
    async      each rank copies what it owns, and a process of its own writes it

on one and on two gloo ranks of one thread each, in rounds in which each comes once. `of_stock` is the median over the
rounds of what a save takes against stock in the same round, in seconds; `cpu_of_stock` is the same in processor
seconds of rank 0, which a busy machine changes less; no wait for a disk is in them. Between two saves training pauses
until what is written beside it has ended. The first save of a run is told apart, since it takes the memory for the
copy. A line is printed when a case ends: the median of the rounds so far; those of the last round are recorded. Exit
status 1 if a checkpoint is not whole, if its weights differ from the stock Trainer's, or if asynchronous saves stop
training for more than 0.1 of stock.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks._record import quantiles, record
from hf_veomni import OmniTrainer, OmniTrainingArguments
from hf_veomni.checkpoint.convert import convert
from hf_veomni.checkpoint.manifest import STAGING, find_damage

GOAL = 0.1
LONGEST = 60.0  # seconds that a save beside training may take
CONTENDERS: dict[str, dict[str, Any]] = {
    "stock": {},
    "plain": {},
    "sharded": {"sharded_weights": True},
    "async": {"async_save": True},
}
CASES = [("stock", 1), *((name, world) for world in (1, 2) for name in ("plain", "sharded", "async"))]


class Rows(torch.utils.data.Dataset):
    """Rows of 16 tokens."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(16) + index
        return {"input_ids": ids, "labels": ids}


class Pause(TrainerCallback):
    """Stands for the training between two saves: at least so many seconds, and until none is under way."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_save(self, args: Any, *_: Any, **__: Any) -> None:
        time.sleep(self.seconds)
        end = time.monotonic() + LONGEST
        while (Path(args.output_dir) / STAGING).exists() and time.monotonic() < end:
            time.sleep(0.05)


class Timed:
    """Notes how long each `_save_checkpoint` takes."""

    stops: list[float]
    cpu: list[float]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if dist.is_initialized():
            dist.barrier()
        begin, used = time.perf_counter(), time.process_time()
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.cpu.append(time.process_time() - used)
        if dist.is_initialized():
            dist.barrier()
        self.stops.append(time.perf_counter() - begin)


class StockTimed(Timed, Trainer):
    """The stock Trainer."""


class OmniTimed(Timed, OmniTrainer):
    """Ours."""


def build(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "intermediate_size": options.hidden * 8 // 3 // 8 * 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": options.layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8192, **sizes, **heads))


def work(rank: int, case: tuple[str, int], folder: str, options: argparse.Namespace) -> None:
    """One rank of one case; the first leaves a row."""
    torch.set_num_threads(1)
    name, world = case
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    shared: dict[str, Any] = {
        "output_dir": f"{folder}/run",
        "per_device_train_batch_size": 4 // world,
        "max_steps": options.saves,
        "adam_epsilon": 1e-4,  # else rounding noise makes full steps
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
    }
    stock = name == "stock"
    arguments = (TrainingArguments if stock else OmniTrainingArguments)(**shared, **CONTENDERS[name])
    kind: Any = StockTimed if stock else OmniTimed
    trainer = kind(model=build(options), args=arguments, train_dataset=Rows(), callbacks=[Pause(options.pause)])
    trainer.stops, trainer.cpu = [], []
    trainer.train()
    if rank == 0:
        row = {"contender": name, "ranks": world, "first": trainer.stops[0], "stops": trainer.stops[1:]}
        row["cpu"] = trainer.cpu[1:]
        Path(folder, "row.json").write_text(json.dumps(row))


def measure(case: tuple[str, int], options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The figures of a case, and the weights of its last checkpoint."""
    with tempfile.TemporaryDirectory(prefix="saving-", dir=options.folder) as folder:
        mp.start_processes(work, (case, folder, options), nprocs=case[1], start_method="forkserver")
        row = json.loads(Path(folder, "row.json").read_text())
        checkpoint = Path(folder, "run", f"checkpoint-{options.saves}")
        row["bytes"] = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        if case[0] != "stock":
            row["damage"] = find_damage(checkpoint, contents=True)
        if (checkpoint / "weights").is_dir():
            convert(checkpoint, Path(folder, "plain"))
            shutil.rmtree(checkpoint)
            checkpoint = Path(folder, "plain")
        return row, load_file(checkpoint / "model.safetensors")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saves", type=int, default=3, help="in each case; the first is told apart")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two saves, at least")
    parser.add_argument("--folder", help="where to write; the system's temporary folder by default")
    parser.add_argument("--no-goal", action="store_true", help="do not fail where asynchronous saves miss the goal")
    return parser.parse_args()


def summarise(runs: list[dict[str, Any]], stock: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of a case's runs, one a round; `stock` are those of the same rounds."""

    def of_stock(name: str) -> float:
        return statistics.median(
            statistics.median(mine[name]) / statistics.median(base[name])
            for mine, base in zip(runs, stock, strict=True)
        )

    return {
        "contender": runs[0]["contender"],
        "ranks": runs[0]["ranks"],
        "bytes": runs[0]["bytes"],
        "first": statistics.median(run["first"] for run in runs),
        "stop": quantiles([stop for run in runs for stop in run["stops"]]),
        "cpu": quantiles([seconds for run in runs for seconds in run["cpu"]]),
        "of_stock": of_stock("stops"),
        "cpu_of_stock": of_stock("cpu"),
        "difference": max(run["difference"] for run in runs),
    }


def describe(row: dict[str, Any]) -> str:
    against = f"{row['of_stock']:.3f} of stock, {row['cpu_of_stock']:.3f} by processor time"
    return (
        f"{row['contender']:8} on {row['ranks']} stops {row['stop']['p50']:7.3f} s ({against}), "
        f"first {row['first']:.3f} s, {row['bytes'] / 1e9:.2f} GB"
    )


def faults(row: dict[str, Any], runs: list[dict[str, Any]], goal: bool) -> Iterator[str]:
    where = f"{row['contender']} on {row['ranks']}"
    yield from (f"{where}: {run['damage']}" for run in runs if run.get("damage"))
    if not row["difference"] <= 1e-4:
        yield f"{where}: the weights differ from stock by {row['difference']:.1e}"
    if goal and row["contender"] == "async" and row["of_stock"] > GOAL:
        yield f"{where}: training stops for {row['of_stock']:.2f} of stock, the goal is {GOAL}"


def main() -> None:
    options = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the ranks that are started below
    os.environ["ACCELERATE_USE_CPU"] = "true"
    mp.get_context("forkserver").set_forkserver_preload(["benchmarks.saving"])
    found: dict[tuple[str, int], list[dict[str, Any]]] = {case: [] for case in CASES}
    expected: dict[str, torch.Tensor] = {}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for number in range(1, options.rounds + 1):
        for case in CASES:
            run, weights = measure(case, options)
            expected = expected or weights
            run["difference"] = max(float((weights[name] - tensor).abs().max()) for name, tensor in expected.items())
            found[case].append(run)
            rows[case] = row = summarise(found[case], found[CASES[0]])  # stock is the first of a round
            print(f"{number}/{options.rounds} {describe(row)}", flush=True)
    record("saving", list(rows.values()))
    off = [fault for case, row in rows.items() for fault in faults(row, found[case], not options.no_goal)]
    if off:
        sys.exit("\n".join(off))


if __name__ == "__main__":
    main()
