"""Dry runs beside ranks that are there: the same steps on 2 and 4 processes with gloo, and what each of them holds.

Shared with tests/ranks/test_dry_run.py. A rank is seen by the dry run's own recorder, and by torch's profiler of
allocations.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig, Qwen3NextConfig

from hf_veomni import prepare_omni
from hf_veomni.dryrun import DryRun, dry_run
from hf_veomni.dryrun.run import add_adapters, text_batch
from hf_veomni.dryrun.step import PHASES, record_step
from hf_veomni.expert.dispatch import rows_per_token

PICTURE = Path(__file__).parents[1] / "docs/images/foresight_ranks.svg"
WITHIN = 0.02
TOKENS = [700, 323]  # no multiple of the ranks: rows are padded
_SIZES = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}


class RankCase(NamedTuple):
    """One step: a model, on how many ranks, and how it is trained.

    Attributes:
        kind: see `config_of`.
    """

    kind: str
    plan: str
    checkpointing: bool
    lora: int | None = None

    @property
    def world(self) -> int:
        return 4 if "dp_" in self.plan else 2

    def __str__(self) -> str:
        options = ["checkpointing"] * self.checkpointing + [f"lora={self.lora}"] * (self.lora is not None)
        return ", ".join([self.kind, self.plan, *options])


RANK_CASES = [
    RankCase("dense", "sp=2", False),
    RankCase("dense", "sp=2", True),
    RankCase("dense", "dp_replicate=2,sp=2", False),
    RankCase("tied", "sp=2,dp_shard=2", False),
    RankCase("moe", "sp=2,ep=2", False),
    RankCase("moe", "sp=2,dp_shard=2,ep=2", True),
    RankCase("dense", "sp=2", False, 8),
    RankCase("linear", "sp=2", False),
]


def config_of(kind: str) -> PreTrainedConfig:
    """Of a small model: "dense", "tied", "moe" (experts) or "linear" (attention)."""
    if kind == "moe":
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        return Qwen3MoeConfig(**_SIZES, **experts, output_router_logits=True)
    if kind == "linear":
        heads = {"linear_num_value_heads": 8, "linear_num_key_heads": 4}
        widths = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        types = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
        return Qwen3NextConfig(**_SIZES, **heads, **widths, **types, mlp_only_layers=[0, 1, 2])
    return LlamaConfig(**_SIZES, tie_word_embeddings=kind == "tied")


def build(kind: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32)


def _balance(router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a dry run assumes on two ranks: as many pairs for each, and rows for as many tokens as at random."""
    logits, scores, chosen = output
    half, token = logits.shape[-1] // 2, torch.arange(len(chosen))
    on_both = 2 * round(len(chosen) * rows_per_token(2, 2 * half, 2) / 2) - len(chosen)
    one = torch.stack([token % half + half * (token % 2), (token + 1) % half + half * (token % 2)], dim=1)
    both = torch.stack([token % half, (token + 1) % half + half], dim=1)
    return logits, scores, torch.where((token < on_both)[:, None], both, one)


def measure(case: RankCase) -> dict[str, Any]:
    """The step of a case with real tensors, on this rank."""
    torch.manual_seed(0)
    return measure_step(add_adapters(build(case.kind), case.lora), text_batch(TOKENS), case.plan, case.checkpointing)


def measure_step(model: nn.Module, batch: dict[str, Any], plan: str, checkpointing: bool) -> dict[str, Any]:
    """A step with real tensors, as the dry run's recorder and torch's own profiler of allocations see it."""
    prepared = prepare_omni(model, plan).train()
    if checkpointing:
        getattr(prepared, "base_model", prepared).activation_checkpointing_enable()
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            module.register_forward_hook(_balance)
    record_step(prepared, [batch], fake=False)  # compares the sequences of an SP group, once
    # Now and then gloo's thread lets go of an exchange's buffers after the wait for it (torch 2.15): not a need.
    records = [_recorded(prepared, batch) for _ in range(4)]
    least = {phase: min(record["phases"][phase] for record in records) for phase in records[0]["phases"]}
    return min(records, key=lambda record: record["peak"]) | {"phases": least}


def _recorded(prepared: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = record_step(prepared, [batch], fake=False)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    total = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return {
        "peak": found.peak.total,
        "categories": found.peak.categories,
        "phases": found.phases,
        "before": found.before,
        "kept": found.kept,
        "collectives": [c._asdict() for c in found.collectives],
        "allocated": highest,
    }


def foresee(case: RankCase) -> list[DryRun]:
    """Dry runs of all ranks of a case."""
    options: dict[str, Any] = {"checkpointing": case.checkpointing, "lora": case.lora, "kernels": "cpu"}
    model = partial(build, case.kind)
    return [dry_run(model, case.plan, case.world, rank=rank, tokens=TOKENS, **options) for rank in range(case.world)]


def payloads(found: list[dict[str, Any]]) -> dict[tuple[str, str], int]:
    """Payload of all ranks by (kind, axis); routing of experts is uneven, but sums to the same."""
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for entry in found:
        sums[entry["kind"], entry["axis"]] += entry["payload"]
    return sums


def _work(rank: int, world: int, cases: Sequence[RankCase], folder: str) -> None:
    torch.set_num_threads(1)
    found = []
    for number, case in enumerate(cases):
        store = f"file://{folder}/store{number}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        found.append(measure(case))
        dist.barrier()
        dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def compare_ranks(cases: Sequence[RankCase]) -> Iterator[dict[str, Any]]:
    """A row for each case; processes are started once for a number of ranks."""
    for world in sorted({case.world for case in cases}):
        some = [case for case in cases if case.world == world]
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_work, (world, some, folder), nprocs=world)
            ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
        for number, case in enumerate(some):
            yield _row(case, foresee(case), [found[number] for found in ranks])


def _row(case: RankCase, foreseen: list[DryRun], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes by rank, as [dry run, rank that is there], and the largest difference over the rank's."""
    ranks = []
    for run, real in zip(foreseen, found, strict=True):
        sizes = {"before": [sum(run.before.values()), sum(real["before"].values())]}
        sizes |= {phase: [run.phases[phase], real["phases"][phase]] for phase in PHASES}
        ranks.append(sizes)
    errors = [dry / real - 1 for sizes in ranks for dry, real in sizes.values()]
    foretold = payloads([c._asdict() for run in foreseen for c in run.collectives])
    counted = payloads([c for real in found for c in real["collectives"]])
    wrong = sum(abs(foretold.get(key, 0) - counted.get(key, 0)) for key in {*foretold, *counted})
    return {
        "part": "ranks",
        "case": str(case),
        "plan": case.plan,
        "ranks": ranks,
        "error": max(errors, key=abs),
        "payload": {f"{kind} {axis}": [foretold.get((kind, axis), 0), size] for (kind, axis), size in counted.items()},
        "sent_error": wrong / sum(counted.values()),
    }


def is_apart(row: dict[str, Any]) -> bool:
    """Whether a rank that is there has other bytes before the step, sends others, or holds 2 % more or less."""
    before = any(dry != real for sizes in row["ranks"] for dry, real in [sizes["before"]])
    return before or row["sent_error"] > 0 or abs(row["error"]) > WITHIN


def draw_ranks(rows: list[dict[str, Any]], path: Path = PICTURE) -> None:
    """By case and moment, how far the dry run of each rank is from the rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.3), layout="constrained")
    axis = figure.subplots()
    percent = 100 * WITHIN
    axis.axvspan(-percent, percent, color="#eeeeee")
    axis.axvline(0, color="black", linewidth=0.8)
    colors = {"before": "#54a24b", "forward": "#4c78a8", "backward": "#f58518", "optimizer": "#e45756"}
    for shift, (moment, color) in enumerate(colors.items()):
        points = [
            (100 * (sizes[moment][0] / sizes[moment][1] - 1), place + 0.16 * (shift - 1.5))
            for place, row in enumerate(rows)
            for sizes in row["ranks"]
        ]
        axis.scatter(*zip(*points, strict=True), s=16, color=color, label=moment, zorder=3)
    axis.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-1.5 * percent, 1.5 * percent))
    axis.set_xlabel("dry run over the rank that is there, % (a point for each rank; grey: within 2 %)")
    axis.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
