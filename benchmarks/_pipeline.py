"""Stages of a pipeline on a simulated clock: what each action computes, and when it could run.

`measure_stage` runs one stage by itself with the package's own `run_window`, in one process that stands for one of p
ranks (`_link.py`): what it receives is made up, so values mean nothing, and each action's CPU time is what it is.
`replay` then lets all stages run these actions in their order on one clock: an action begins when the one before it on
its stage is through and what it reads has arrived. So neither a loaded machine nor p processes on two cores blur the
result.

    stage 0   F0 F1 F2 F3 .. B0        a message leaves at the end of its action and arrives
    stage 1      F0 F1 F2 B0           bytes / bandwidth + latency later, after those before it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks._link import Link, linked
from hf_veomni.pipeline.microbatch import MicroBatch
from hf_veomni.pipeline.schedule import Action, one_forward_one_backward


@dataclass
class Stage:
    """What one rank did in a window.

    Attributes:
        actions: in its order.
        seconds: CPU time of each.
        sent: bytes that each action hands to a neighbour.
        held: bytes that the window's backwards were waiting for, at most: what forwards have saved, no parameters.
        one: the same of a single micro-batch.
        layers: of the model, on this rank.
        chunks: stages that it has.
    """

    actions: list[Action]
    seconds: list[float]
    sent: list[int]
    held: int
    one: int
    layers: int
    chunks: int = 1


class Saved:
    """Bytes that autograd keeps for backwards, each storage once; what has a parameter's shape is left out."""

    def __init__(self, model: nn.Module) -> None:
        self.now = self.most = 0
        self._left_out = {shape for p in model.parameters() if p.dim() > 1 for shape in (p.shape, p.mT.shape)}
        self._known: dict[int, list[int]] = {}  # storage -> how often it is kept, its bytes

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        counts = tensor.shape not in self._left_out and storage.nbytes() > 0
        return _Kept(self if counts else None, tensor, storage.data_ptr())

    def add(self, key: int, size: int) -> None:
        count = self._known.setdefault(key, [0, size])
        count[0] += 1
        if count[0] == 1:
            self.now += count[1]
            self.most = max(self.most, self.now)

    def remove(self, key: int) -> None:
        count = self._known[key]
        count[0] -= 1
        if not count[0]:
            self.now -= self._known.pop(key)[1]


class _Kept:
    def __init__(self, log: Saved | None, tensor: Tensor, key: int) -> None:
        self.log, self.tensor, self.key = log, tensor, key
        if log is not None:
            log.add(key, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        if self.log is not None:
            self.log.remove(self.key)


def _unpack(kept: _Kept) -> Tensor:
    return kept.tensor


def measure_stage(
    make: Any, ranks: int, place: int, batches: Sequence[dict[str, Tensor]], repeats: int, chunks: int = 1
) -> Stage:
    """Run the windows of one rank. Seconds are the least of `repeats` windows, action by action.

    Args:
        make: returns the whole stock model.
        chunks: stages of each rank.
    """
    from hf_veomni import ParallelPlan, prepare_omni, run_window

    actions = one_forward_one_backward(place, ranks, len(batches), chunks)
    link = Link()
    with linked(link, ranks, place):
        model: Any = prepare_omni(make(), ParallelPlan(pp_size=ranks, pp_stages=chunks))
        layers = sum(any(True for _ in layer.parameters()) for layer in model.model.layers)
        targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)

        def forward(index: int) -> Tensor | None:
            return model(**batches[index], num_items_in_batch=torch.tensor(float(targets))).loss

        timed: list[list[float]] = []
        for _ in range(repeats + 1):  # the first one warms
            with _clocked(forward, link) as (call, seconds):
                run_window(model, batches, compute_loss=call)
            timed.append(seconds)
            model.zero_grad()
        held = [_held(model, batches[:count], forward) for count in (1, len(batches))]
        hidden = batches[0]["input_ids"].numel() * model.config.hidden_size * 4
    ends = {True: 0, False: ranks * chunks - 1}  # stages that hand nothing on
    sent = [0 if action.chunk * ranks + place == ends[action.backward] else hidden for action in actions]
    least = [min(values) for values in zip(*timed[1:], strict=True)]
    return Stage(actions, least, sent, held[1], held[0], layers, chunks)


def _held(model: Any, batches: Sequence[dict[str, Tensor]], forward: Any) -> int:
    from hf_veomni import run_window

    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, _unpack):
        run_window(model, batches, compute_loss=forward)
    model.zero_grad()
    return saved.most


@contextmanager
def _clocked(forward: Any, link: Link) -> Iterator[tuple[Any, list[float]]]:
    """A forward, and the list to which the CPU time of each action is added, without what moves bytes."""
    seconds: list[float] = []
    stock = MicroBatch.backward

    def timed(function: Any, *args: Any) -> Any:
        begin = link.compute
        try:
            return function(*args)
        finally:
            seconds.append(link.compute - begin)

    MicroBatch.backward = lambda batch: timed(stock, batch)  # type: ignore[method-assign]
    try:
        yield lambda index: timed(forward, index), seconds
    finally:
        MicroBatch.backward = stock  # type: ignore[method-assign]


class Ran(NamedTuple):
    """When an action ran."""

    action: Action
    begin: float
    end: float


def replay(stages: Sequence[Stage], bandwidth: float = float("inf"), latency: float = 0.0) -> list[list[Ran]]:
    """All stages on one clock. Links between neighbours are serial, one for each direction."""
    ran: list[list[Ran]] = [[] for _ in stages]
    arrived: dict[tuple[int, bool, int], float] = {}  # what a stage has handed on
    free: dict[tuple[int, bool], float] = {}
    left = sum(len(stage.actions) for stage in stages)
    while left:
        before = left
        for place, stage in enumerate(stages):
            while len(ran[place]) < len(stage.actions):
                number = len(ran[place])
                action = stage.actions[number]
                begin = ran[place][-1].end if ran[place] else 0.0
                mine = action.chunk * len(stages) + place
                reads = mine + (1 if action.backward else -1), action.backward, action.index
                if 0 <= reads[0] < len(stages) * stage.chunks:
                    if reads not in arrived:
                        break
                    begin = max(begin, arrived[reads])
                end = begin + stage.seconds[number]
                ran[place].append(Ran(action, begin, end))
                link = (place, action.backward)
                seconds = stage.sent[number] / bandwidth + latency
                sent = max(end, free.get(link, 0.0)) + seconds
                free[link] = arrived[mine, action.backward, action.index] = sent
                left -= 1
        assert left < before, "the stages wait for each other"
    return ran


def bubble(ran: Sequence[Sequence[Ran]]) -> float:
    """Share of all stages' time in which they stand still."""
    end = max(each[-1].end for each in ran)
    return 1 - sum(one.end - one.begin for each in ran for one in each) / (end * len(ran))
