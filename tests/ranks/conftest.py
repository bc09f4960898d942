"""Parity with the stock model on one rank, for all tests here that compare it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_veomni import ParallelPlan
from tests.ranks.parity import Run, Setting, compare, compute_reference
from tests.ranks.stored import write_checkpoint

# bf16 has 8 bits: an order of sums of its own changes a gradient by a few of its last ones.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.05}


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setting], Path]:
    folder = tmp_path_factory.mktemp("reference")
    known: dict[str, Path] = {}

    def find(setting: Setting) -> Path:
        key = repr(setting)
        if key not in known:
            known[key] = folder / f"{len(known)}.pt"
            compute_reference(setting, known[key])
        return known[key]

    return find


@pytest.fixture
def check(ranks, reference) -> Callable[..., None]:
    """Run on as many ranks as the plan has and compare; fails with the worst figures of all ranks."""

    def check(setting: Setting, run: Run, tolerance: float | None = None) -> None:
        plan = ParallelPlan.parse(run.plan)
        world_size = plan.sp_size * plan.dp_replicate_size * (plan.dp_shard_size or 1)
        setting = replace(setting, dp_size=world_size // plan.sp_size)
        found = ranks(world_size).run(compare, setting, run, str(reference(setting)), timeout=120)
        tolerance = tolerance or TOLERANCE[setting.dtype]
        worst = {key: max(errors[key] for errors in found) for key in ("loss", "logits", "gradient", "norm")}
        summary = f"{worst}, worst gradient: {[errors['parameter'] for errors in found]}"
        print(f"{setting.model} {run.plan}: {summary}")
        assert not any(errors["one_sided"] for errors in found), found[0]["one_sided"]
        assert max(worst.values()) < tolerance, summary
        for rank, errors in enumerate(found):
            group = found[rank - rank % plan.sp_size]
            assert errors["losses"] == group["losses"], "the loss differs within an SP group"

    return check


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    """`checkpoint(name, stacked=False, **overrides)`: the results of `write_checkpoint`, made once."""
    known: dict[str, tuple[str, str]] = {}

    def find(name: str, stacked: bool = False, **overrides: int) -> tuple[str, str]:
        key = f"{name} {stacked} {overrides}"
        if key not in known:
            known[key] = write_checkpoint(tmp_path_factory.mktemp(name), name, stacked, **overrides)
        return known[key]

    return find
