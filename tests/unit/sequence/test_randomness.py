"""Dropout draws from streams of its own, and leaves the process-wide generator alike on all ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_veomni import ParallelPlan
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.randomness import attach_dropout


def _after_a_forward(model: nn.Module, state: ParallelState) -> Tensor:
    torch.manual_seed(5)
    attach_dropout(model, state)
    model(torch.ones(2))
    return torch.randperm(99)  # an epoch of a shuffling sampler


@pytest.mark.parametrize("train", [True, False])
def test_stages_with_dropout_and_without_read_the_same_rows(train: bool) -> None:
    plan = ParallelPlan(pp_size=2, dp_shard_size=1)
    stages = [ParallelState(plan, torch.device("cpu"), pp_rank=rank) for rank in (0, 1)]
    orders = [
        _after_a_forward(model.train(train), state)
        for model, state in zip((nn.Dropout(0.5), nn.Identity()), stages, strict=True)
    ]
    assert torch.equal(*orders)


def test_a_row_in_slices_without_dropout_leaves_the_generator() -> None:
    state = ParallelState(ParallelPlan(sp_size=2, dp_shard_size=1), torch.device("cpu"))
    torch.manual_seed(5)
    wanted = torch.randperm(99)
    assert torch.equal(_after_a_forward(nn.Identity().train(), state), wanted)
