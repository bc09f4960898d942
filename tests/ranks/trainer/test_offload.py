"""Trainer's own options of activation checkpointing on ranks: every n-th layer, and its inputs in host memory."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.ranks.training import Run, assert_same_training, train_omni, train_stock

OPTIONS = {"use_reentrant": False, "offload": True, "every_n_layers": 2}


def _train(plan: str, run: Run) -> tuple[Any, set[tuple[int, ...]]]:
    """What training left behind, and the shapes of what torch moved to the host, which can pin nothing here."""
    moved: set[tuple[int, ...]] = set()
    stock = torch.Tensor.copy_

    def noting(self: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if sys._getframe(1).f_code.co_name == "pack_to_cpu":
            moved.add(tuple(source.shape))
        return stock(self, source, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "is_available", lambda: False)
        patch.setattr(torch.Tensor, "copy_", noting)
        return train_omni(plan, run), moved


@pytest.mark.parametrize("plan", ["sp=2", pytest.param("dp_shard=2", marks=pytest.mark.slow), "sp=2,overlap=pairs"])
def test_offloaded_layers_equal_one_process(ranks, plan: str) -> None:
    sizes = {"num_hidden_layers": 3}
    expected = train_stock(Run(num_rows=8, config=sizes), 1 if "sp=2" in plan else 2)
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": OPTIONS}
    run = Run(num_rows=8, config=sizes, arguments=options)
    for found, moved in ranks(2).run(_train, plan, run, timeout=240):
        assert_same_training(found, expected)
        hidden = [shape for shape in moved if len(shape) == 3]
        longest = max(len(row["input_ids"]) for row in run.dataset(8, 0))
        share = -(-longest // 2) if "sp=2" in plan else longest  # this rank's slice of the row
        assert hidden and max(shape[1] for shape in hidden) <= share, moved
