"""What one rank of a window sees alone, or two ranks see differently, is refused on every rank."""

from __future__ import annotations

from typing import Any

import torch

from tests.models import build_model, packed_batch


def _refusal(model: Any, batches: list[dict[str, Any]]) -> str:
    from hf_veomni import run_window

    try:
        run_window(model, batches)
    except ValueError as error:
        return str(error)
    return "none"


def _counts() -> str:
    from hf_veomni import prepare_omni

    rows = [packed_batch((5, 3), seed=seed) for seed in range(3)]
    return _refusal(prepare_omni(build_model("llama"), "dp_shard=2"), rows[torch.distributed.get_rank() :])


def test_windows_of_different_length_are_refused(ranks) -> None:
    assert all("the data ranks were given [3, 2] micro-batches" in found for found in ranks(2).run(_counts))
