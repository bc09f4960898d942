"""How often a micro-batch makes the host wait for the device, against the stock model on the same packed sequence.

    python -m benchmarks syncs     # gloo ranks on the CPU, where `_syncs.py` follows the values; or ranks on a GPU

    dense, experts, vision    four layers each; a packed sequence as the collator makes it
    own                       the same row as plain tensors, of which the host knows nothing
    padded                    a row with an attention mask in place of packing
    checkpointing             the layers run again in the backward

A table says for the first rank: reads in the forward and in the backward, uploads that the host waits for, and where
they are. Stock is one process without a plan. Exit status 1 if a loss differs from that of the stock model, or if
there are more reads than the goal: one more than stock for dense models, one more a layer with experts on several
ranks, and none in the recomputation.
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
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from benchmarks._options import device_parser, parse_for_device
from benchmarks._record import record
from benchmarks._syncs import READ, UPLOAD, SyncCounter
from benchmarks.on_gpu.ranks import sum_and_divide
from hf_veomni import OmniDataCollatorWithPacking, prepare_omni
from hf_veomni.host import forget

IMAGE, VIDEO, START, PATCH = 500, 501, 502, 4
TOLERANCE = 1e-5
# model, row, plan (None is stock), checkpointing
CASES = [
    (model, row, plan, checkpointing)
    for model, row, plans in (
        ("dense", "packed", (None, "sp=1,dp_shard=1", "sp=2")),
        ("dense", "own", (None, "sp=2")),
        ("dense", "padded", (None, "sp=2")),
        ("experts", "packed", (None, "sp=2", "sp=2,ep=2")),
        ("vision", "packed", (None, "sp=2")),
    )
    for plan in plans
    for checkpointing in ((False, True) if row == "packed" and model != "vision" else (False,))
]
_SHAPE = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


def build(model: str, options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    shape = {**_SHAPE, "intermediate_size": 128, "num_hidden_layers": options.layers}
    if model == "dense":
        return AutoModelForCausalLM.from_config(Qwen3Config(**shape))
    if model == "experts":
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape, **experts))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": PATCH}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
    config = Qwen3VLConfig(
        text_config={**shape, "rope_parameters": rope}, vision_config=vision, **tokens, vision_end_token_id=503
    )
    return Qwen3VLForConditionalGeneration(config)


def make_batch(model: str, row: str, config: Any) -> dict[str, Tensor]:
    """A row of an odd number of tokens: three documents, or one behind which there is padding."""
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> Tensor:
        return torch.randint(3, IMAGE, (count,), generator=generator)

    if model == "vision":
        return OmniDataCollatorWithPacking(model_config=config)([_with_pictures(words, n) for n in (1, 2)])
    documents = [{"input_ids": ids, "labels": _half(ids)} for ids in map(words, (20, 44, 13))]
    batch = OmniDataCollatorWithPacking()(documents)
    if row == "own":
        batch = {name: forget(values) for name, values in batch.items()}
    if row == "padded":
        del batch["position_ids"]
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, -5:] = 0
        batch["labels"][:, -5:] = -100
    return batch


def _half(ids: Tensor) -> Tensor:
    """Labels of a chat: the first half is a prompt."""
    labels = ids.clone()
    labels[: len(ids) // 2] = -100
    return labels


def _with_pictures(words: Any, count: int) -> dict[str, Tensor]:
    grids = torch.tensor([[1, 4, 4], [1, 4, 8]])[:count]
    parts = [torch.tensor([START, *[IMAGE] * (int(grid.prod()) // 4), 503]) for grid in grids]
    ids = torch.cat([words(6), *parts, words(9)])
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * PATCH**2, generator=torch.Generator().manual_seed(count))
    types = (ids == IMAGE).long()
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": types}


def run(case: tuple, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Loss and counts of the second step; the first one makes what is made once."""
    model_name, row, plan, checkpointing = case
    model = build(model_name, options)
    batch = make_batch(model_name, row, model.config)
    model = model.to(device) if plan is None else prepare_omni(model, plan)
    if plan is not None and device.type == "cuda":
        sum_and_divide(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    counter = SyncCounter(device)
    model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).loss.backward()
    with counter:
        placed = counter.place(batch)
        loss = model(**placed, use_cache=False).loss
        counter.phase = "backward"
        loss.backward()
    return {
        "loss": loss.item(),
        "forward": counter.count(READ, "forward"),
        "backward": counter.count(READ, "backward"),
        "uploads": counter.count(UPLOAD),
        "sites": [[*key, count] for key, count in counter.found.most_common()],
    }


def _devices(options: argparse.Namespace, rank: int) -> torch.device:
    if options.device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def work(rank: int, folder: str, options: argparse.Namespace) -> None:
    """One rank of those cases that have a plan."""
    torch.set_num_threads(1)
    device = _devices(options, rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = [run(case, options, device) if two_ranks(case) else None for case in CASES]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def two_ranks(case: tuple) -> bool:
    return case[2] is not None and case[2].startswith("sp=2")


def make_row(
    case: tuple, counts: dict[str, Any], stock: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """A row of the result, beside the counts of the stock model."""
    model, row, plan, checkpointing = case
    layers = options.layers if plan is not None and "ep=" in plan else 0
    return {
        "device": options.device,
        "model": model,
        "row": row,
        "contender": plan or "stock",
        "checkpointing": checkpointing,
        "layers": options.layers,
        "goal": None if plan is None else stock["forward"] + stock["backward"] + 1 + layers,
        "goal_backward": None if plan is None else stock["backward"],
        "loss_error": abs(counts["loss"] - stock["loss"]) / abs(stock["loss"]),
        **counts,
    }


def summarize(found: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    stock = {(case[0], case[1], case[3]): counts for case, counts in zip(CASES, found, strict=True) if case[2] is None}
    return [
        make_row(case, counts, stock[case[0], case[1], case[3]], options)
        for case, counts in zip(CASES, found, strict=True)
    ]


def check(rows: list[dict[str, Any]]) -> list[str]:
    """What is off."""
    off = []
    for row in rows:
        where = f"{row['model']} {row['row']} {row['contender']}{' checkpointing' * row['checkpointing']}"
        if not row["loss_error"] <= TOLERANCE:
            off.append(f"{where}: the loss differs from stock by {row['loss_error']:.1e}")
        if row["goal"] is not None and row["forward"] + row["backward"] > row["goal"]:
            off.append(f"{where}: {row['forward'] + row['backward']} reads, the goal is {row['goal']}")
        if row["goal_backward"] is not None and row["backward"] > row["goal_backward"]:
            off.append(f"{where}: {row['backward']} reads in the backward, of which stock has {row['goal_backward']}")
    return off


def parse() -> argparse.Namespace:
    parser = device_parser(__doc__.split("\n")[0], {"fp32": torch.float32})
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sites", action="store_true", help="print where each of them is")
    return parse_for_device(parser, {"cpu": {}, "cuda": {}})


def main() -> None:
    options = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the ranks that are started below
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, options), nprocs=2)
        found = json.loads(Path(folder, "0.json").read_text())
    found = [
        run(c, options, _devices(options, 0)) if not two_ranks(c) else x for c, x in zip(CASES, found, strict=True)
    ]
    rows = summarize(found, options)
    for row in rows:
        print(
            f"{row['model']:8} {row['row']:7} {row['contender']:16} {'checkpointing' * row['checkpointing']:13}  "
            f"reads {row['forward']:3} + {row['backward']:2}  uploads {row['uploads']:3}  goal {row['goal'] or '':2}"
        )
        for phase, kind, site, count in row["sites"] if options.sites else ():
            print(f"    {count:3} {phase:8} {kind:6} {site}")
    record("syncs", rows, plan="sp=2")
    if off := check(rows):
        sys.exit("\n".join(off))


if __name__ == "__main__":
    main()
