"""Writes the files here that are named after a job, each with the planner's fastest layout that fits.

    python accelerate_configs/make.py                      from the formulas and `dry_runs.json`
    python accelerate_configs/make.py --dry-run NAME ...   dry-run these jobs first ("all": each takes up to a minute)

Sizes are those of the models' own configs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig, Qwen3VLConfig

from hf_veomni.dryrun import dry_run
from hf_veomni.planner import Entry, Plans, plan_layouts
from hf_veomni.planner.report import accelerate_config

DRY_RUNS = Path(__file__).with_name("dry_runs.json")

_LONG: dict[str, Any] = {"max_position_embeddings": 1 << 18, "tie_word_embeddings": False, "head_dim": 128}
_QWEN: dict[str, Any] = {**_LONG, "vocab_size": 151936}
_8B: dict[str, Any] = {
    **_QWEN, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
MODELS: dict[str, PreTrainedConfig] = {
    "Qwen3-8B": Qwen3Config(**_8B),
    "Qwen3-32B": Qwen3Config(
        **_QWEN, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "Llama-3.3-70B": LlamaConfig(
        **_LONG, vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        **_QWEN, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        **_QWEN, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536,
    ),
    "Qwen3-VL-8B": Qwen3VLConfig(
        text_config=_8B,
        vision_config={"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096},
        tie_word_embeddings=False,
    ),
}  # fmt: skip


class Job(NamedTuple):
    """One file.

    Attributes:
        checkpointing: only layouts that have it: with images, whose activations the formulas do not have.
    """

    name: str
    model: str
    device: str
    ranks: int
    context: int
    document: int
    lora: int | None = None
    checkpointing: bool = False


JOBS = [
    Job("gpu1_24gb_8b_lora", "Qwen3-8B", "rtx4090-24gb", 1, 4096, 2048, 16),
    Job("gpu1_80gb_8b_lora", "Qwen3-8B", "h100-80gb", 1, 32768, 4096, 16),
    Job("gpu1_80gb_32b_lora", "Qwen3-32B", "h100-80gb", 1, 4096, 4096, 16),
    Job("gpu8_80gb_8b", "Qwen3-8B", "h100-80gb", 8, 32768, 4096),
    Job("gpu8_80gb_32b", "Qwen3-32B", "h100-80gb", 8, 16384, 4096),
    Job("gpu8_80gb_70b_lora", "Llama-3.3-70B", "h100-80gb", 8, 16384, 4096, 16),
    Job("gpu8_80gb_30b_moe", "Qwen3-30B-A3B", "h100-80gb", 8, 16384, 4096),
    Job("gpu8_80gb_8b_vlm", "Qwen3-VL-8B", "h100-80gb", 8, 16384, 4096, checkpointing=True),
    Job("nodes2_80gb_32b", "Qwen3-32B", "h100-80gb", 16, 65536, 8192),
    Job("nodes2_80gb_70b", "Llama-3.3-70B", "h100-80gb", 16, 16384, 4096),
    Job("nodes2_80gb_30b_moe", "Qwen3-30B-A3B", "h100-80gb", 16, 65536, 8192),
    Job("nodes16_80gb_70b", "Llama-3.3-70B", "h100-80gb", 128, 131072, 8192),
    Job("nodes16_80gb_30b_moe", "Qwen3-30B-A3B", "h100-80gb", 128, 163840, 163840),
    Job("nodes16_80gb_235b_moe", "Qwen3-235B-A22B", "h100-80gb", 128, 32768, 8192),
]


@cache
def plans_of(job: Job) -> Plans:
    return plan_layouts(
        MODELS[job.model], job.ranks, job.device, context=job.context, document=job.document, lora=job.lora,
        mixed_precision=True, without=("pp", "pairs"),  # which an Accelerate loop has to be written for
    )  # fmt: skip


def entry_of(job: Job) -> Entry:
    """The fastest that fits, of those that the job takes."""
    plans = plans_of(job)
    found = (e for e in plans.fitting if e.layout.checkpointing or not job.checkpointing)
    return next(found, plans.best)


def known_dry_runs() -> dict[str, Any]:
    """By job, what `dry_run_of` has found; of the others the header has the formulas' figures."""
    return json.loads(DRY_RUNS.read_text()) if DRY_RUNS.exists() else {}


def dry_run_of(job: Job) -> dict[str, Any]:
    """What the step of a job's layout holds at its peak, by the real code."""
    layout = entry_of(job).layout
    run = dry_run(
        MODELS[job.model], layout.plan, job.ranks, tokens=[job.document] * (job.context // job.document),
        mixed_precision=True, checkpointing=layout.checkpointing, lora=job.lora,
    )  # fmt: skip
    return {"layout": str(layout), "peak_bytes": run.peak.total, "peak": run.peak.categories}


def texts() -> Iterator[tuple[str, str]]:
    """(name of the file, its text)"""
    known = known_dry_runs()
    for job in JOBS:
        plans, best = plans_of(job), entry_of(job)
        found = known.get(job.name, {})
        if found and found["layout"] != str(best.layout):
            raise SystemExit(f"{job.name} is another layout than in {DRY_RUNS.name}: --dry-run {job.name}")
        trained = "full fine-tuning" if job.lora is None else f"LoRA of rank {job.lora}"
        name = f"{job.name}.yaml"
        purpose = f"{trained} of {job.model}"
        yield name, accelerate_config(plans, best, f"accelerate_configs/{name}", purpose, found.get("peak"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", nargs="+", default=[], metavar="NAME")
    wanted = parser.parse_args().dry_run
    known = known_dry_runs()
    for job in JOBS:
        if job.name in wanted or wanted == ["all"]:
            known[job.name] = dry_run_of(job)
            print(job.name, known[job.name]["layout"], f"{known[job.name]['peak_bytes'] / 2**30:.1f} GiB", flush=True)
            DRY_RUNS.write_text(json.dumps({key: known[key] for key in sorted(known)}, indent=1) + "\n")
    for name, text in texts():
        (Path(__file__).parent / name).write_text(text)
        plan = text.rpartition("veomni:")[2].partition('"')[0]
        processes = text.partition("num_processes: ")[2].partition("\n")[0]
        print(f"| `{name}` | {processes} | `{plan}` |")  # for the table in docs/configs.md


if __name__ == "__main__":
    main()
