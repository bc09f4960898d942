"""What a save holds on each rank: of sharded weights no rank has more than its own part, be it for a moment."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ranks.training import Run

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
PLAN = "dp_shard=2"


class _Alive(TorchDispatchMode):
    """The most bytes of tensors at a time that have been made inside: copies, buffers of collectives, results."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[list[weakref.ref[Any]], int]] = {}  # tensors of a storage, and its bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for leaf in (leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)):
            place = self._storage(leaf)
            if place in self._alive:
                self._alive[place][0].append(weakref.ref(leaf))
            elif place not in given:
                self._alive[place] = [weakref.ref(leaf)], self._local(leaf).untyped_storage().nbytes()
        self._alive = {key: known for key, known in self._alive.items() if any(ref() is not None for ref in known[0])}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return found

    @staticmethod
    def _local(tensor: Any) -> Any:
        return tensor._local_tensor if isinstance(tensor, DTensor) else tensor

    def _storage(self, tensor: Any) -> int:
        return self._local(tensor).untyped_storage()._cdata


@contextmanager
def _measuring(peaks: list[int]) -> Iterator[None]:
    tracemalloc.start()  # bytes and arrays of Python
    try:
        with _Alive() as alive:
            yield
        peaks.append(alive.peak + tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def _peak_of_save(folder: Path, sharded: bool) -> tuple[int, int, int]:
    """Of the weights alone: the peak on this rank, the bytes of the model, those of its largest tensor."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run(config=WIDE, arguments={"max_steps": 2, "save_strategy": "steps", "save_steps": 1})
    given = run.all_arguments(plan=PLAN, output_dir=str(folder), sharded_weights=sharded, save_only_model=True)
    trainer = OmniTrainer(model=run.model(), args=OmniTrainingArguments(**given), **run.data())
    peaks: list[int] = []
    save = trainer._save_checkpoint

    def measured(*args: Any) -> None:
        with _measuring(peaks):
            save(*args)

    trainer._save_checkpoint = measured  # type: ignore[method-assign]
    trainer.train()
    sizes = [p.numel() * p.element_size() for p in trainer.model.parameters()]
    dist.barrier()
    return peaks[-1], sum(sizes), max(sizes)  # of the second save: the first one imports modules, too


@pytest.mark.parametrize("sharded", [True, False])
def test_no_rank_holds_the_model_that_it_writes(ranks, tmp_path, sharded):
    """Plain files show that the measure sees it: there rank 0 holds everything."""
    (first, whole, largest), (second, *_) = ranks(2).run(_peak_of_save, tmp_path, sharded, timeout=90)
    assert largest < whole / 16
    if sharded:
        assert max(first, second) < whole / 8, (first, second, whole)
    else:
        assert first >= whole, (first, second, whole)
