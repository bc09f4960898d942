"""A huge image or a long video in a vision tower at sp=2: whole on each rank, by items and frames, or by Ulysses.

    python -m benchmarks towers     # gloo ranks on the CPU

A Qwen2.5-VL whose tower outweighs its text backbone, trained; the models of the three rules live in the same processes
and take turns. Of the slowest or fullest rank:

    seconds     CPU time of a step; a rank that waits does not compute
    peak        bytes of activations (`_memory.py`), text backbone included

With one image `balance` has nothing to assign. The bound of both is 1/sp for the tower's part.

Exit status 1 if a gradient of the tower differs from that of the tower whole, or if a rule that shares (frames of the
video; Ulysses for both) is not below 0.75 of the whole in seconds or in peak.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks._memory import MemoryLog
from benchmarks._record import quantiles, record
from hf_veomni import ParallelPlan, prepare_omni

SP, WORDS, PATCH = 2, 64, 4
RULES = ("replicate", "balance", "ulysses")
IMAGE, VIDEO, START = 250, 251, 252
TOLERANCE, LIMIT = 1e-5, 0.75


def build(options: argparse.Namespace) -> Any:
    text = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 8192}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 4]}
    vision = {"depth": options.depth, "hidden_size": options.hidden, "intermediate_size": 3 * options.hidden}
    vision |= {"num_heads": options.heads, "out_hidden_size": 64, "patch_size": PATCH, "window_size": 8 * PATCH}
    vision["fullatt_block_indexes"] = list(range(1, options.depth, 2))
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32).train()


def make_row(kind: str, grid: list[int]) -> dict[str, Tensor]:
    """Words around one item of t x h x w patches."""
    generator = torch.Generator().manual_seed(1)
    t, h, w = grid
    words = torch.randint(0, IMAGE, (WORDS,), generator=generator)
    token = IMAGE if kind == "picture" else VIDEO
    ids = torch.cat([words, torch.tensor([START]), torch.full((t * h * w // 4,), token), words])[None]
    types = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    row = {"input_ids": ids, "labels": ids.masked_fill(ids >= IMAGE, -100), "mm_token_type_ids": types}
    pixels = torch.randn(t * h * w, 3 * 2 * PATCH**2, generator=generator)
    names = ("pixel_values", "image_grid_thw") if kind == "picture" else ("pixel_values_videos", "video_grid_thw")
    return row | dict(zip(names, (pixels, torch.tensor([grid])), strict=True))


def step(model: Any, row: dict[str, Tensor]) -> Tensor:
    """A rank's shard of the gradient of the tower's first weight, on which everything behind it has a say."""
    model(**row).loss.backward()
    gradient = model.model.visual.patch_embed.proj.weight.grad.to_local().clone()
    model.zero_grad()
    return gradient


def peak(model: Any, row: dict[str, Tensor]) -> int:
    log = MemoryLog()
    log.label_gradients(model)
    with log:
        step(model, row)
    return log.peak("activation")[0]


def work(rank: int, folder: str, options: argparse.Namespace) -> None:
    """One rank: both rows under all rules, in turns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SP)
    plans = {rule: ParallelPlan(sp_size=SP, modules={"*.visual": {"sp": rule}}) for rule in RULES}
    models = {rule: prepare_omni(build(options), plan) for rule, plan in plans.items()}
    found: dict[str, Any] = {}
    for kind, grid in (("picture", options.picture), ("video", options.video)):
        row = make_row(kind, grid)
        gradients = {rule: step(model, row) for rule, model in models.items()}
        whole = gradients["replicate"]
        errors = {rule: float((gradient - whole).norm() / whole.norm()) for rule, gradient in gradients.items()}
        mine: dict[str, Any] = {rule: {"error": errors[rule], "seconds": []} for rule in RULES}
        for _ in range(options.rounds):
            for rule, model in models.items():
                begin = time.process_time()
                step(model, row)
                mine[rule]["seconds"].append(time.process_time() - begin)
        for rule, model in models.items():
            mine[rule]["peak"] = peak(model, row)
        found[kind] = mine
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def summarize(ranks: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the result for each item and rule, with ratios to the tower that runs whole."""
    rows = []
    for kind in ("picture", "video"):
        slowest = {
            rule: [max(pair) for pair in zip(*(rank[kind][rule]["seconds"] for rank in ranks), strict=True)]
            for rule in RULES
        }
        fullest = {rule: max(rank[kind][rule]["peak"] for rank in ranks) for rule in RULES}
        for rule in RULES:
            ratios = [a / b for a, b in zip(slowest[rule], slowest["replicate"], strict=True)]
            rows.append(
                {
                    "device": "cpu",
                    "item": kind,
                    "grid": getattr(options, kind),
                    "rule": rule,
                    "sp_size": SP,
                    **{name: getattr(options, name) for name in ("depth", "hidden", "heads", "rounds")},
                    "seconds": quantiles(slowest[rule]),
                    "seconds_over_whole": quantiles(ratios),
                    "peak": fullest[rule],
                    "peak_over_whole": round(fullest[rule] / fullest["replicate"], 4),
                    "gradient_error": max(rank[kind][rule]["error"] for rank in ranks),
                }
            )
    return rows


def check(rows: list[dict[str, Any]]) -> list[str]:
    """What is off."""
    off = []
    for row in rows:
        where = f"of the {row['item']} under '{row['rule']}'"
        if not row["gradient_error"] <= TOLERANCE:
            off.append(f"the gradient {where} differs by {row['gradient_error']:.1e}")
        if row["rule"] == "ulysses" or (row["rule"], row["item"]) == ("balance", "video"):
            found = {"seconds": row["seconds_over_whole"]["p50"], "peak": row["peak_over_whole"]}
            off += [f"{what} {where} is {ratio:.3f} of the whole" for what, ratio in found.items() if ratio > LIMIT]
    return off


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--picture", type=int, nargs=3, default=[1, 56, 64], help="t h w in patches")
    parser.add_argument("--video", type=int, nargs=3, default=[17, 16, 16])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the ranks that are started below
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, options), nprocs=SP)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(SP)]
    rows = summarize(ranks, options)
    for row in rows:
        print(
            f"{row['item']:8} {row['rule']:10} step {row['seconds']['p50']:.2f} s "
            f"(x {row['seconds_over_whole']['p50']:.3f})  peak {row['peak'] / 2**20:7.1f} MiB "
            f"(x {row['peak_over_whole']:.3f})  gradient within {row['gradient_error']:.1e}"
        )
    record("towers", rows, plan=f"sp={SP}")
    if off := check(rows):
        sys.exit("\n".join(off))


if __name__ == "__main__":
    main()
