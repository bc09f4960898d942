"""One row for all pairs of a token and a rank: models against the stock one, and against one row a pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_veomni import prepare_omni, run_pair
from hf_veomni.expert import dispatch
from tests.models import packed_batch
from tests.ranks.parity import Run, Setting, make_model

EIGHT = {"num_experts": 8}  # top-2 of 8 over two ranks: 1.57 rows a token in place of 2


@pytest.mark.parametrize("overlap", ["", pytest.param(",overlap=chunks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lora", [False, True])
def test_models_equal_the_stock_one(check: Callable[..., Any], lora: bool, overlap: str) -> None:
    setting = Setting("qwen3_moe", lora=lora, overrides=EIGHT)
    check(setting, Run(f"sp=2,ep=2{overlap}", checkpointing=True))


@pytest.mark.slow
def test_compiled_layers_equal_the_stock_one(check: Callable[..., Any]) -> None:
    check(Setting("qwen3_moe", overrides=EIGHT), Run("sp=2,ep=2", compiled="aot_eager"))


def _differences(plan: str, setting: Setting, checkpointing: bool) -> tuple[float, list[bool]]:
    """The largest relative difference of losses and gradients, and whether bundles were made with and without."""
    stock, made = dispatch.make_bundles, []
    batches = [packed_batch([11, 1, 17, 8], seed=seed) for seed in (0, 1)]
    found = []
    for bundled in (True, False):
        made.append(False)

        def noting(*args: Any) -> Any:
            made[-1] = True
            return stock(*args)

        dispatch.make_bundles, stock_rule = noting, dispatch.saves_bytes
        dispatch.saves_bytes = stock_rule if bundled else lambda *sizes: False
        try:
            model: Any = prepare_omni(make_model(setting), plan)
            if checkpointing:
                model.gradient_checkpointing_enable()
            if "pairs" in plan:
                losses = run_pair(lambda batch, model=model: model(**batch, use_cache=False).loss, *batches)
            else:
                losses = tuple(model(**batch, use_cache=False).loss for batch in batches)
            torch.stack(losses).sum().backward()
        finally:
            dispatch.make_bundles, dispatch.saves_bytes = stock, stock_rule
        gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
        found.append([*(loss.detach() for loss in losses), *gradients])
    pairs = [(a, b) for a, b in zip(*found, strict=True) if a.numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs), made


@pytest.mark.parametrize(
    ("plan", "name", "lora", "checkpointing"),
    [
        ("sp=2,ep=2", "qwen3_moe", True, True),
        pytest.param("dp_shard=2,ep=2", "qwen3_moe", False, False, marks=pytest.mark.slow),
        ("sp=2,ep=2,overlap=pairs", "qwen3_moe", False, True),
        ("sp=2,ep=2,overlap=chunks", "qwen3_moe", False, True),
        pytest.param("sp=2,ep=2,overlap=pairs", "qwen3_moe", True, False, marks=pytest.mark.slow),
        pytest.param("sp=2,ep=2", "deepseek_v3", False, True, marks=pytest.mark.slow),
    ],
)
def test_models_equal_one_row_a_pair(ranks, plan: str, name: str, lora: bool, checkpointing: bool) -> None:
    setting = Setting(name, lora=lora, overrides={"n_routed_experts": 8} if name == "deepseek_v3" else EIGHT)
    for worst, made in ranks(2).run(_differences, plan, setting, checkpointing, timeout=120):
        assert made == [True, False]
        assert worst < 1e-6
