"""An Accelerator that counts data ranks, for the arithmetic of loops written for one reader of the data a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator, PartialState

from hf_veomni.hf.require import override, require_overrides
from hf_veomni.plan import ParallelPlan


class _DataRanks(Accelerator):
    """What a loop multiplies and divides by is the number of readers: the ranks of an SP group are one of them."""

    omni_plan: ParallelPlan

    @property
    @override
    def num_processes(self) -> int:
        """Data ranks. `accelerator.state.num_processes` are all ranks."""
        return self.omni_plan.dp_size

    @property
    @override
    def is_last_process(self) -> bool:
        return self.state.is_last_process

    @contextmanager
    @override
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """A part of `inputs` for each data rank; the ranks of an SP group get the same one."""
        reader: Any = _Reader(self.omni_plan)
        with PartialState.split_between_processes(reader, inputs, apply_padding=apply_padding) as part:
            yield part


require_overrides(_DataRanks)


class _Reader:
    """accelerate's state, as it would be with one process for each data rank."""

    def __init__(self, plan: ParallelPlan) -> None:
        self._state: Any = PartialState()
        self.num_processes = plan.dp_size
        self.process_index = self._state.process_index % plan.stage_size // plan.sp_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


@contextmanager
def counting_within_stage(accelerator: Any, plan: ParallelPlan) -> Iterator[None]:
    """Inside, `process_index` is the rank's place in its pipeline stage: the stages read the same batches."""
    kind = type(accelerator)
    if plan.pp_size > 1:
        place = accelerator.state.process_index % plan.stage_size
        accelerator.__class__ = type(kind.__name__, (kind,), {"process_index": property(lambda self: place)})
    try:
        yield
    finally:
        accelerator.__class__ = kind


def count_data_ranks(accelerator: Any, plan: ParallelPlan) -> None:
    """Let `num_processes` and `split_between_processes` of one Accelerator go by data ranks."""
    kind = type(accelerator)
    accelerator.omni_plan = plan
    accelerator.__class__ = type(kind.__name__, (_DataRanks, kind) if kind is not Accelerator else (_DataRanks,), {})


def count_processes(accelerator: Any) -> None:
    """Undo `count_data_ranks`: for the Trainer, whose own arithmetic knows of ranks that share a batch."""
    kind = type(accelerator)
    if issubclass(kind, _DataRanks):
        accelerator.__class__ = next(base for base in kind.__mro__[1:] if base is not _DataRanks)
