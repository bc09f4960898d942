"""Liger's kernels under plans, where the package is installed: loss, logits and gradients of the stock model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.liger_formulas import PACKAGE, put_formulas
from tests.ranks.parity import Run, Setting, make_model, measure

pytest.importorskip("triton")
pytest.importorskip(PACKAGE)

TILED = {"sp_size": 2, "modules": {"*.mlp": {"tokens": "tiled"}}}
KEPT = {"sp_size": 2, "modules": {"*.self_attn": {"checkpointing": "keep"}}}
CASES = [
    ("llama", Run("sp=2")),
    ("llama", Run({**TILED, "overlap": "chunks"})),
    ("llama", Run(KEPT, checkpointing=True)),
    ("llama", Run("sp=2,overlap=pairs")),
    ("qwen3_moe", Run("sp=2,ep=2")),
    ("qwen3_moe", Run("dp_shard=2,ep=2", checkpointing=True)),
    ("deepseek_v3", Run("sp=2,ep=2,overlap=pairs")),
    ("qwen3_next", Run("sp=2,ep=2")),
    ("gemma3", Run("sp=2", checkpointing=True)),
    ("phi3", Run("sp=2")),
]


def _compare(setting: Setting, run: Run, path: str) -> dict[str, Any]:
    from hf_veomni import prepare_omni
    from hf_veomni.trainer.liger import liger_kernels

    with pytest.MonkeyPatch.context() as patch:
        put_formulas(patch)
        patch.setattr("hf_veomni.tiles.TILE", 8)
        model: Any = make_model(setting)
        plan: Any = run.plan
        with liger_kernels(model, SimpleNamespace(use_liger_kernel=True, liger_kernel_config=None)):
            prepare_omni(model, plan)
        if run.checkpointing:
            model.gradient_checkpointing_enable()
        return measure(model, setting, run, path)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("name", "run"), CASES, ids=lambda value: str(getattr(value, "plan", value)))
def test_kernels_under_a_plan_equal_the_stock_model(ranks, reference, name: str, run: Run, lora: bool) -> None:
    if "pairs" in str(run.plan):
        pytest.importorskip("greenlet")
    dp_size = 2 if str(run.plan).startswith("dp") else 1
    setting = Setting(name, dp_size=dp_size, micro_batches=2 if "pairs" in str(run.plan) else 1)
    setting = replace(setting, lora=lora)
    for errors in ranks(2).run(_compare, setting, run, str(reference(setting)), timeout=120):
        worst = {key: errors[key] for key in ("loss", "logits", "gradient", "norm")}
        assert max(worst.values()) < 1e-5 and not errors["one_sided"], (worst, errors["parameter"])
