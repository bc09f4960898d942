"""Activation memory falls as 1/sp: bytes of live activations of a training step on 1, 2 and 4 ranks.

    python -m benchmarks activation_memory

A dense model with grouped key/value heads and the chunked loss, one packed sequence, gloo ranks on the CPU. Counted
are the storages that the step makes (`_memory.py`), parameters, FSDP's gathered copies and gradients apart:

    held    live when the loss is there: what the forward keeps for the backward
    peak    the most that is ever live in forward and backward, temporaries included

The bound is 1/sp. Exit status 1 if held or peak of the fullest rank, times sp, differ by more than 10 % from one
rank's, or if the loss differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks._memory import MemoryLog
from benchmarks._record import record
from benchmarks._rows import packed_row, ragged_lengths
from hf_veomni import ParallelPlan, prepare_omni

LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
WARM_UP = 64  # tokens of the first row, which makes FSDP's buffers


def build(options: argparse.Namespace) -> PreTrainedModel:
    heads = options.heads
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocab,
        max_position_embeddings=options.tokens,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).train()


def train(model: PreTrainedModel, batch: dict[str, Tensor], log: MemoryLog | None = None) -> float:
    loss = model(**batch, use_cache=False).loss
    if log is not None:
        log.mark("loss")
    loss.backward()
    value = float(loss.detach())
    model.zero_grad()
    return value


def measure(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Bytes of this rank's activations in one step, and what they are."""
    log = MemoryLog()
    log.label_gradients(model)
    with log:
        loss = train(model, batch, log)
    peak, moment = log.peak("activation")
    return {
        "loss": loss,
        "held": log.at("loss", "activation"),
        "peak": peak,
        "peak_in": "forward" if moment <= log.marks["loss"] else "backward",
        "left": log.curve("activation")[-1],
        "largest_held": log.largest(log.marks["loss"], 6, "activation"),
        "largest_at_peak": log.largest(moment, 6, "activation"),
    }


def work(rank: int, sp_size: int, folder: str, options: argparse.Namespace) -> None:
    """One rank: the same weights and row everywhere, with and without gradient checkpointing."""
    torch.set_num_threads(1)
    if sp_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=sp_size)
    model = prepare_omni(build(options), ParallelPlan(sp_size=sp_size))
    lengths = ragged_lengths(options.tokens, options.median)
    batch = packed_row(lengths, options.vocab)
    measured = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        train(model, packed_row([WARM_UP], options.vocab))
        measured[str(checkpointing)] = measure(model, batch)
    Path(folder, f"{rank}.json").write_text(json.dumps(measured))
    if sp_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def run_ranks(sp_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What `work` measured on each of sp_size ranks."""
    with tempfile.TemporaryDirectory() as folder:
        if sp_size == 1:
            work(0, 1, folder, options)
        else:
            mp.spawn(work, (sp_size, folder, options), nprocs=sp_size)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(sp_size)]


def compare(rows: list[dict[str, Any]], tolerance: float, loss_tolerance: float) -> list[str]:
    """Add the ratios to one rank's bytes to the rows, and say which are off."""
    off = []
    for row in rows:
        (one,) = (r for r in rows if r["sp_size"] == 1 and r["checkpointing"] == row["checkpointing"])
        where = f"sp={row['sp_size']}, checkpointing={row['checkpointing']}"
        for what in ("held", "peak"):
            ratio = max(rank[what] for rank in row["ranks"]) * row["sp_size"] / one["ranks"][0][what]
            row[f"{what}_times_sp"] = round(ratio, 4)
            if abs(ratio - 1) > tolerance:
                off.append(f"{what} activations at {where} are {ratio:.3f} of one rank's / sp")
        expected = one["ranks"][0]["loss"]
        error = max(abs(rank["loss"] - expected) for rank in row["ranks"]) / abs(expected)
        if not error <= loss_tolerance:
            off.append(f"loss at {where} differs by {error:.1e} from one rank's")
        if any(rank["left"] for rank in row["ranks"]):
            off.append(f"activations are left after the step at {where}: the log is not to be trusted")
    return off


def show(row: dict[str, Any]) -> None:
    full = max(row["ranks"], key=lambda rank: rank["peak"])
    print(
        f"sp={row['sp_size']} checkpointing={row['checkpointing']!s:5}  held {full['held'] / 2**20:8.1f} MiB "
        f"(x sp {row['held_times_sp']:.3f})  peak {full['peak'] / 2**20:8.1f} MiB (x sp {row['peak_times_sp']:.3f}), "
        f"in the {full['peak_in']}"
    )
    for origin, size in full["largest_at_peak"].items():
        print(f"    {size / 2**20:8.1f} MiB  {origin}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sp", type=int, nargs="+", default=[1, 2, 4], help="must contain 1")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--median", type=int, default=512, help="tokens of the median document")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--dtype", choices=[*LOSS_TOLERANCE], default="float32")
    parser.add_argument("--tolerance", type=float, default=0.1)
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the ranks that are started below
    rows = []
    for sp_size in options.sp:
        ranks = run_ranks(sp_size, options)
        for checkpointing in (False, True):
            mine = [rank[str(checkpointing)] for rank in ranks]
            shape = {key: value for key, value in vars(options).items() if key not in ("sp", "tolerance")}
            rows.append({"device": "cpu", "sp_size": sp_size, "checkpointing": checkpointing, **shape, "ranks": mine})
    off = compare(rows, options.tolerance, LOSS_TOLERANCE[options.dtype])
    for row in rows:
        show(row)
    record("activation_memory", rows, plan=", ".join(f"sp={size}" for size in options.sp))
    if off:
        sys.exit("\n".join(off))


if __name__ == "__main__":
    main()
