"""What expert parallelism costs and saves: bytes on a rank, bytes sent, time of a step, at ep = 1, 2, 4.

    python -m benchmarks expert_parallel     # 4 gloo ranks on the CPU, or all GPUs (nccl) where there are any

A Qwen3-MoE, full training with AdamW, a row of its own for every data rank; the models of all ep sizes live in the
same processes and take turns. Counted, not estimated:

    held        parameters, gradients and optimizer state of this rank: the sizes of its local tensors
    gathered    one layer's experts as they stand in memory while they compute: 1/ep of them
    exchanged   bytes handed to the all-to-alls of one layer in one step, and those of them for other ranks

FSDP shards the experts over efsdp = ranks / ep, EP over the rest, so `held` is the same at every ep; what EP saves is
`gathered`, and the all-gathers behind it. With t tokens on a rank, K experts each and H the hidden size, `exchanged`
is four all-to-alls (dispatch and combine, forward and backward) of u H elements, of which (ep - 1) / ep leave the rank
when routing is even, beside t K router weights there and their gradient back, and t K integers. u is t K, or where
that saves enough the number of (token, rank) with an expert of the token on the rank (`expert/bundles.py`). With a
router that is forced to be even that holds to the byte on every rank; with the real one what all ranks together hand
over is reported over it, and equals it where each pair has a row.

Exit status 1 if a count differs from its formula, if `held` or `gathered` is not what is said here, or if a loss
differs between ep sizes by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks._exchange import counted, even_index, even_routing
from benchmarks._options import device_parser, parse_for_device
from benchmarks._record import quantiles, record
from benchmarks._rows import packed_row, ragged_lengths
from hf_veomni import ParallelPlan, get_parallel_state, prepare_omni
from hf_veomni.expert.dispatch import saves_bytes

# On CUDA the layer of Qwen3-30B-A3B; on the CPU as small as shows the same.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "hidden": 2048,
        "heads": 32,
        "kv_heads": 4,
        "intermediate": 768,
        "experts": 128,
        "top_k": 8,
        "vocab": 151_936,
        "layers": 4,
        "tokens": 16_384,
        "median": 1024,
        "dtype": "bfloat16",
        "rounds": 5,
        "steps": 3,
    },
    "cpu": {
        "hidden": 256,
        "heads": 4,
        "kv_heads": 2,
        "intermediate": 384,
        "experts": 8,
        "top_k": 2,
        "vocab": 4096,
        "layers": 2,
        "tokens": 512,
        "median": 64,
        "dtype": "float32",
        "rounds": 5,
        "steps": 2,
    },
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
CHECKED_STEPS = 3
SHAPE = ("hidden", "heads", "kv_heads", "intermediate", "experts", "top_k", "vocab", "layers", "tokens", "dtype")


def build(options: argparse.Namespace) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.intermediate,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.hidden // options.heads,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        vocab_size=options.vocab,
        max_position_embeddings=options.tokens,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).train()


def local_bytes(tensors: Any) -> int:
    """Bytes of what this rank has of them."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in local)


class Contender:
    """One ep size: a prepared model, its optimizer, and this rank's row."""

    def __init__(self, ep_size: int, options: argparse.Namespace) -> None:
        self.options = options
        self.model = prepare_omni(build(options), ParallelPlan(sp_size=options.sp, ep_size=ep_size))
        self.state = get_parallel_state(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        row = packed_row(ragged_lengths(options.tokens, options.median), options.vocab, seed=self.state.dp_rank)
        self.batch = {key: value.to(self.state.device) for key, value in row.items()}
        self.losses = [self.step() for _ in range(CHECKED_STEPS)]

    def gradients(self) -> Tensor:
        loss = self.model(**self.batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def step(self) -> float:
        loss = self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def held(self) -> dict[str, int]:
        """Bytes of this rank between backward and optimizer step, and what one layer's experts take at once."""
        gathered: list[int] = []

        def look(act_fn: nn.Module, args: Any) -> None:
            gathered.append(local_bytes(experts.parameters(recurse=False)))

        experts = next(module.experts for module in self.model.modules() if hasattr(module, "experts"))
        hook = experts.act_fn.register_forward_pre_hook(look)
        self.gradients()
        hook.remove()
        parameters = list(self.model.parameters())
        states = (value for state in self.optimizer.state.values() for value in state.values())
        held = {
            "parameters": local_bytes(parameters),
            "gradients": local_bytes(p.grad for p in parameters if p.grad is not None),
            "optimizer": local_bytes(value for value in states if value.dim() > 0),  # not the counts of steps
            "gathered": max(gathered),
        }
        self.optimizer.zero_grad()
        return held

    def exchanged(self) -> dict[str, Any]:
        """What this rank sent in one step of one layer, by routing."""
        ep_mesh = self.state.ep_mesh
        group = None if ep_mesh is None else ep_mesh.get_group()
        with counted(group) as by_router:
            self.gradients()
        with even_routing(self.model), counted(group) as evenly:
            self.gradients()
        self.optimizer.zero_grad()
        found = {"router": asdict(by_router), "even": asdict(evenly)}
        return {
            routing: {key: value / self.options.layers for key, value in counts.items()}
            for routing, counts in found.items()
        }

    def block(self) -> list[float]:
        """Seconds of each step: wall clock on CUDA, CPU time of this process else; the first one does not count."""
        seconds = []
        for _ in range(self.options.steps + 1):
            begin = self._now()
            self.step()
            seconds.append(self._now() - begin)
        return seconds[1:]

    def _now(self) -> float:
        if self.state.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def start(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    if options.ranks > 1:
        backend = "nccl" if options.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)


def work(rank: int, folder: str, options: argparse.Namespace) -> None:
    """One rank: all ep sizes in turns."""
    start(rank, folder, options)
    contenders = {ep_size: Contender(ep_size, options) for ep_size in options.ep}
    found = {
        ep_size: {"losses": c.losses, "held": c.held(), "exchanged": c.exchanged(), "seconds": []}
        for ep_size, c in contenders.items()
    }
    for _ in range(options.rounds):
        for ep_size, contender in contenders.items():
            found[ep_size]["seconds"].append(contender.block())
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if options.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def is_bundled(options: argparse.Namespace, ep_size: int) -> bool:
    return ep_size > 1 and saves_bytes(options.top_k, options.experts, ep_size)


def formula(options: argparse.Namespace, ep_size: int) -> dict[str, float]:
    """Bytes of one layer and step that a rank hands over, and that leave it with even routing; counts are int64."""
    item, tokens = getattr(torch, options.dtype).itemsize, options.tokens // options.sp
    calls, pairs, away = 4 if ep_size > 1 else 0, tokens * options.top_k, (ep_size - 1) / ep_size
    bundled = is_bundled(options, ep_size)
    rows = pairs
    if bundled:
        ranks = even_index(tokens, options.top_k, options.experts) // (options.experts // ep_size)
        rows = sum(len(set(each)) for each in ranks.tolist())
    handed = calls * rows * options.hidden * item
    counts = (options.experts + bundled * ep_size) * 8 + bundled * pairs * 4
    return {
        "calls": calls,
        "handed": handed,
        "left": handed * away,
        "count_left": counts * away,
        "weight_left": 2 * pairs * item * away,
    }


def summarize(ep_size: int, ranks: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """One row of the result from what every rank measured."""
    expected = formula(options, ep_size)
    sums = {key: sum(rank["exchanged"]["router"][key] for rank in ranks) for key in ("handed", "left")}
    # A round's time is the mean over its steps and ranks: on the CPU ranks wait without computing.
    rounds = [
        sum(sum(rank["seconds"][index]) for rank in ranks) / len(ranks) / options.steps
        for index in range(options.rounds)
    ]
    return {
        "ep_size": ep_size,
        "bundled": is_bundled(options, ep_size),
        "ranks": len(ranks),
        "sp_size": options.sp,
        **{key: getattr(options, key) for key in SHAPE},
        "device": options.device,
        "losses": [rank["losses"] for rank in ranks],
        "held": {key: max(rank["held"][key] for rank in ranks) for key in ranks[0]["held"]},
        "formula": expected,
        "even": [rank["exchanged"]["even"] for rank in ranks],
        "router": [rank["exchanged"]["router"] for rank in ranks],
        "left_over_formula": sums["left"] / len(ranks) / expected["left"] if ep_size > 1 else None,
        "handed_over_formula": sums["handed"] / len(ranks) / expected["handed"] if ep_size > 1 else None,
        "rounds": rounds,
        "seconds": quantiles(rounds),
    }


def compare(rows: list[dict[str, Any]], tolerance: float) -> list[str]:
    """Add the ratios to ep=1 to the rows, and say what is off."""
    off = []
    one = rows[0]
    held = ("parameters", "gradients", "optimizer")
    for row in rows:
        where = f"at ep={row['ep_size']}"
        row["time_over_ep1"] = quantiles([a / b for a, b in zip(row["rounds"], one["rounds"], strict=True)])
        row["held_over_ep1"] = sum(row["held"][key] for key in held) / sum(one["held"][key] for key in held)
        row["gathered_over_ep1"] = row["held"]["gathered"] / one["held"]["gathered"]
        row["loss_error"] = max(
            abs(a - b) / abs(b)
            for mine, theirs in zip(row["losses"], one["losses"], strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )
        if not row["loss_error"] <= tolerance:
            off.append(f"loss {where} differs by {row['loss_error']:.1e} from that at ep=1")
        if not 0.99 <= row["held_over_ep1"] <= 1.01:
            off.append(f"parameters, gradients and optimizer {where} take {row['held_over_ep1']:.3f} of ep=1's")
        if row["gathered_over_ep1"] != 1 / row["ep_size"]:
            off.append(f"gathered experts {where} take {row['gathered_over_ep1']:.3f} of ep=1's")
        for rank, even in enumerate(row["even"]):
            off += [
                f"{key} of rank {rank} {where} is {even[key]:g} with even routing, not {expected:g}"
                for key, expected in row["formula"].items()
                if even[key] != expected
            ]
        if row["ep_size"] > 1 and not row["bundled"] and row["handed_over_formula"] != 1:
            off.append(f"bytes handed over {where} are {row['handed_over_formula']} of the formula's")
    return off


def show(row: dict[str, Any]) -> None:
    sizes = "  ".join(f"{key} {size / 2**20:.2f}" for key, size in row["held"].items())
    print(f"ep={row['ep_size']}  MiB a rank: {sizes}")
    if row["ep_size"] > 1:
        sent, counts = row["formula"]["left"] / 2**20, row["formula"]["count_left"]
        real = row["left_over_formula"]
        print(
            f"      leave a rank, a layer and step: {sent:.3f} MiB with even routing, x {real:.3f} with the router's; "
            f"{counts:.0f} bytes of integers"
        )
    print(
        f"      step {row['seconds']['p50']:.3f} s, x {row['time_over_ep1']['p50']:.3f} of ep=1; "
        f"loss within {row['loss_error']:.1e} of ep=1",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = device_parser(__doc__.split("\n")[0], TOLERANCE)
    parser.add_argument("--ranks", type=int, help="4 on the CPU, all GPUs on CUDA")
    parser.add_argument("--sp", type=int, default=1, help="ranks that share a row")
    parser.add_argument("--ep", type=int, nargs="+", help="sizes to compare, 1 first (default: 1 2 4, as ranks allow)")
    for name in ("median", "rounds", "steps", *(key for key in SHAPE if key != "dtype")):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    options = parse_for_device(parser, DEFAULTS)
    options.ranks = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 4)
    options.ep = options.ep or [size for size in (1, 2, 4) if options.ranks % size == 0]
    if options.ep[0] != 1 or options.tokens // options.sp * options.top_k % options.experts:
        parser.error(
            f"--ep ({options.ep}) must begin with 1, and --experts ({options.experts}) divide a rank's tokens x top_k "
            f"({options.tokens // options.sp * options.top_k}), or no routing is even"
        )
    return options


def main() -> None:
    options = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the ranks that are started below
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        if options.ranks == 1:
            work(0, folder, options)
        else:
            mp.spawn(work, (folder, options), nprocs=options.ranks)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.ranks)]
    rows = [summarize(size, [rank[str(size)] for rank in ranks], options) for size in options.ep]
    off = compare(rows, TOLERANCE[options.dtype])
    for row in rows:
        show(row)
    record("expert_parallel", rows, plan=f"sp={options.sp}, ep={', '.join(map(str, options.ep))}")
    if off:
        sys.exit("\n".join(off))


if __name__ == "__main__":
    main()
