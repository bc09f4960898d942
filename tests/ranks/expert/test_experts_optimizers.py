"""Optimizers over both meshes at once, and two sharded models in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import build_model, packed_batch
from tests.ranks.parity import documents

STEPS = 3
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "loop": {"foreach": False},
}


def _optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    # A large eps: Adam would make a full step of the rounding noise of a gradient of zero.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1, **OPTIMIZERS[name])


def _stock_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    items = int((batch["labels"][:, 1:] != -100).sum())
    losses = [model(**d, num_items_in_batch=items, use_cache=False).loss for _, _, d in documents(batch)]
    return torch.stack(losses).sum()


def _train_stock(seed: int = 0) -> dict[str, Tensor]:
    model = build_model("qwen3_moe", seed=seed)
    optimizer = _optimizer(model, "loop")
    for step in range(STEPS):
        rows = [packed_batch((9 + step, 14), seed=2 * step + rank) for rank in range(2)]
        torch.stack([_stock_loss(model, row) for row in rows]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _train(plan: str, name: str, two_models: bool) -> list[dict[str, Tensor]]:
    from hf_veomni import clip_grad_norm_, get_parallel_state, prepare_omni

    models = [prepare_omni(build_model("qwen3_moe", seed=seed), plan) for seed in range(2 if two_models else 1)]
    optimizers = [_optimizer(model, name) for model in models]
    rank = get_parallel_state(models[0]).dp_rank
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(**packed_batch((9 + step, 14), seed=2 * step + rank)).loss.backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    found: list[Any] = [list(model.named_parameters()) for model in models]
    return [{name: p.full_tensor() for name, p in parameters} for parameters in found]


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert float((found[name] - weight).abs().max()) < 1e-5, name


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("plan", ["dp_shard=2,sp=2,ep=2", "dp_replicate=2,sp=2,ep=2"])
def test_optimizer_over_both_meshes_equals_one_process(ranks, plan, name):
    expected = _train_stock()
    (found,), *_ = ranks(4).run(_train, plan, name, False, timeout=120)
    _assert_equal(found, expected)


def test_two_models_train_side_by_side(ranks):
    first, second = ranks(4).run(_train, "dp_shard=2,sp=2,ep=4", "foreach", True, timeout=120)[0]
    _assert_equal(first, _train_stock(seed=0))
    _assert_equal(second, _train_stock(seed=1))
