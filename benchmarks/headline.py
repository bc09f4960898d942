"""The headline on paper: 30B, 235B and 671B mixtures of experts at 160K tokens, on up to 16,384 devices, by formulas.

    python -m benchmarks headline            plans, growth, and mixed hardware: seconds, no device
    python -m benchmarks headline --dry-run  and the step of one of 128 ranks by the real code: half a minute of a core

Nothing here is measured but what the dry run takes. docs/headline.md has the assumptions.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import DeepseekV3Config, Qwen3MoeConfig

from benchmarks._record import record
from hf_veomni.dryrun import dry_run
from hf_veomni.planner import GIB, Entry, Plans, find_device, plan_layouts
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.report import draw
from hf_veomni.planner.time import time_of

CONTEXT, RANKS = 163840, 128
PAPER = Layout(1, 16, 8, 8, True)  # sp=8, ep=8: what stays inside of a node
DEVICES = ("h100-80gb", "a100-80gb")
_COMMON: dict[str, Any] = {"max_position_embeddings": 1 << 18, "tie_word_embeddings": False, "head_dim": 128}
_QWEN: dict[str, Any] = {**_COMMON, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8}
MODELS = {
    "30B-A3B": Qwen3MoeConfig(
        **_QWEN, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        moe_intermediate_size=768,
    ),
    "235B-A22B": Qwen3MoeConfig(
        **_QWEN, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4,
        moe_intermediate_size=1536,
    ),
    # DeepSeek-V3 with latent attention, shared experts and dense first layers, without its second prediction.
    "671B": DeepseekV3Config(max_position_embeddings=1 << 18),
}  # fmt: skip


def row_of(case: str, plans: Plans, entry: Entry) -> dict[str, Any]:
    return {
        "case": case,
        "parameters": plans.shape.total,
        "device": plans.device.name,
        "ranks": plans.world_size,
        "layouts": len(plans.entries),
        "fitting": len(plans.fitting),
        "plan": str(entry.layout.plan),
        "checkpointing": entry.layout.checkpointing,
        "gib": round(entry.memory.total / GIB, 1),
        "reserved_gib": round(entry.reserved / GIB, 1),
        "over_gib": round(max(entry.over, 0) / GIB, 1),
        "tokens_per_second_per_device": round(entry.tokens_per_second / plans.world_size),
        "mfu": round(plans.mfu(entry), 3),
        "seconds": round(entry.time.seconds, 2),
        "parts": {name: round(seconds, 3) for name, seconds in entry.time.parts.items()},
    }


def headline() -> list[dict[str, Any]]:
    """128 devices: the paper's layout, and the planner's first, for sequences of one document and of several."""
    rows = []
    for device in DEVICES:
        for document in (CONTEXT, CONTEXT // 5, CONTEXT // 20):
            plans = plan_layouts(MODELS["30B-A3B"], RANKS, device, context=CONTEXT, document=document)
            entries = {"sp=8, ep=8": plans.find(PAPER), "the planner's first": plans.entries[0]}
            rows += [{**row_of(case, plans, entry), "document": document} for case, entry in entries.items()]
    return rows


def growth() -> list[dict[str, Any]]:
    """More devices, larger models."""
    rows = []
    for name, config in MODELS.items():
        for ranks in (RANKS, 1024, 16384):
            plans = plan_layouts(config, ranks, "h100-80gb", context=CONTEXT)
            rows.append(row_of(name, plans, plans.entries[0]))
    return rows


def even_split(fast: Callable[[int], float], slow: Callable[[int], float], total: int) -> int:
    """Tokens of a slow rank, where it and a fast one have `total` together and take equally long, up to one token.

    Args:
        fast, slow: seconds of a number of tokens, which grow with it.
    """
    low, high = 0, total
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if slow(middle) <= fast(total - middle) else (low, middle)
    return low


def mixed() -> dict[str, Any]:
    """Half A100, half H100: the slow ranks' price with equal sequences, and sequences that take equally long."""
    plans = plan_layouts(MODELS["30B-A3B"], RANKS, "h100-80gb", context=CONTEXT)
    shape, fast, slow = plans.shape, find_device("h100-80gb"), find_device("a100-80gb")
    # What both kinds take part in goes at the slower links.
    fast = replace(fast, inter_gbs=min(fast.inter_gbs, slow.inter_gbs))

    def seconds(device: Any, tokens: int) -> float:
        return time_of(shape, PAPER, Job(tokens, tokens), device).seconds

    alone, waits = seconds(fast, CONTEXT), seconds(slow, CONTEXT)
    low = even_split(partial(seconds, fast), partial(seconds, slow), 2 * CONTEXT)
    even = seconds(slow, low)
    pace = 2 * CONTEXT / PAPER.sp / 2  # tokens of a rank on average
    return {
        "case": "64 A100 beside 64 H100",
        "h100_alone": round(pace / alone),
        "equal_sequences": round(pace / waits),
        "slow_tokens": low,
        "fast_tokens": 2 * CONTEXT - low,
        "even_seconds": round(even, 2),
        "even_split": round(pace / even),
    }


def by_dry_run() -> dict[str, Any]:
    """The paper's layout by the real code, on one of 128 ranks that are not there."""
    run = dry_run(MODELS["30B-A3B"], PAPER.plan, RANKS, tokens=CONTEXT, checkpointing=True)
    peak = {name: round(size / GIB, 2) for name, size in run.peak.categories.items()}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "case": "dry run of sp=8, ep=8",
        "gib": round(run.peak.total / GIB, 2),
        "peak": peak,
        "phase": run.peak.place.phase,
        "sent_gib": {axis: round(size / GIB, 2) for axis, size in run.traffic.items()},
        "seconds": round(run.seconds, 1),
        "host_gib": round(host, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="and one rank by the real code")
    parser.add_argument("--picture", help="memory and speed of all layouts of 128 H100 into this file")
    options = parser.parse_args()
    rows = [*headline(), *growth(), mixed(), *([by_dry_run()] if options.dry_run else [])]
    for row in rows:
        print(row)
    record("headline", rows)
    if options.picture:
        draw(plan_layouts(MODELS["30B-A3B"], RANKS, "h100-80gb", context=CONTEXT), options.picture)


if __name__ == "__main__":
    main()
