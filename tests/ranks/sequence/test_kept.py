"""Exchanges and kernels of attention that activation checkpointing does not run again, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_veomni import prepare_omni, run_pair
from tests.models import build_model, packed_batch
from tests.unit.sequence.test_kept import Kernels, kept


def _step(name: str, overlap: str, keep: bool) -> tuple[list[torch.Tensor], int, int]:
    """Loss and gradients, exchanges of the backward, and kernels in it."""
    plan = kept(sp_size=2, overlap=overlap) if keep else {"sp_size": 2, "overlap": overlap}
    model: Any = prepare_omni(build_model(name), plan)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [packed_batch([11, 1, 17, 8], seed=seed) for seed in (0, 1)]

    def compute(batch: Any) -> Any:
        return model(**batch, use_cache=False).loss

    losses = run_pair(compute, *batches) if overlap == "pairs" else [compute(batches[0])]
    calls, original = [], dist.all_to_all_single

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    dist.all_to_all_single = counting
    try:
        with Kernels() as kernels:
            torch.stack(list(losses)).sum().backward()
    finally:
        dist.all_to_all_single = original
    gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    return [*(loss.detach() for loss in losses), *gradients], len(calls), kernels.count


@pytest.mark.parametrize("overlap", [pytest.param("none", marks=pytest.mark.slow), "pairs", "chunks"])
@pytest.mark.parametrize("name", ["llama", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_the_same_bits_with_half_the_exchanges(ranks, name: str, overlap: str) -> None:
    plain = ranks(2).run(_step, name, overlap, False, timeout=120)
    found = ranks(2).run(_step, name, overlap, True, timeout=120)
    for (mine, calls, kernels), (expected, before, again) in zip(found, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
        assert calls * 2 == before and kernels == 0 < again
