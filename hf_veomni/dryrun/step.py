"""One training step as the Trainer makes it, watched from below: on a rank that is there, or on a fake one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hf_veomni import hf
from hf_veomni.data.halves import split_batch
from hf_veomni.dryrun.memory import CATEGORIES, Peak
from hf_veomni.dryrun.progress import watch_layers
from hf_veomni.dryrun.record import StepRecorder
from hf_veomni.dryrun.traffic import Collective, axis_names
from hf_veomni.fsdp import clip_grad_norm_
from hf_veomni.mesh import get_parallel_state
from hf_veomni.pairs import run_pair

Batch = Mapping[str, Any]
PHASES = ("forward", "backward", "optimizer")


class Recorded:
    """What a `StepRecorder` saw of a step; attributes as those of `DryRun`."""

    def __init__(self, recorder: StepRecorder, begin: int, kept: dict[str, int]) -> None:
        memory = recorder.memory
        self.before, self.kept = memory.live(begin), kept
        self.peak: Peak = memory.peak(begin)
        self.phases = {name: memory.highest(begin, name) for name in PHASES}
        self.collectives: tuple[Collective, ...] = tuple(recorder.traffic.collectives())


def _in_flight(model: nn.Module, batches: Sequence[Batch]) -> Iterator[Sequence[Batch]]:
    """What runs at a time: one micro-batch, or under pairs two, or the halves of the last one, as OmniTrainer does."""
    if get_parallel_state(model).plan.overlap != "pairs":
        yield from ([batch] for batch in batches)
        return
    size = hf.text_config(hf.base_model(model)).hidden_size
    for first in range(0, len(batches), 2):
        two = batches[first : first + 2]
        with unset_fake_temporarily():  # positions have values
            halves = split_batch(two[0], size) if len(two) == 1 else None
        yield halves or two


def _forward(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    def loss(batch: Batch) -> Tensor:
        return model(**batch, use_cache=False).loss

    if len(batches) == 1:
        return loss(batches[0])
    first, second = run_pair(loss, *batches)
    return first + second


def record_step(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    fake: bool,
    autocast: bool = False,
    max_norm: float | None = 1.0,
) -> Recorded:
    """Run a step of a prepared model with AdamW, whose states are there already, as in any step but the first.

    Args:
        batches: the micro-batches of the step: what the model is called with, as on this rank.
        fake: whether tensors are fake; else their values are used, and the parameters change.
        autocast: to bf16, as the Trainer with `bf16=True`.
        max_norm: of the gradients; None does not clip.

    Collectives: those of a step.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    recorder = StepRecorder(model, axis_names(get_parallel_state(model)), fake)
    kept: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
    pairs = get_parallel_state(model).plan.overlap == "pairs"
    passes = len(batches) + (len(batches) % 2 if pairs else 0)  # two halves of a last one
    with recorder, watch_layers(model, passes, lambda: recorder.phase):
        recorder.note_owned(optimizer)
        begin = len(recorder.memory.events)
        for given in _in_flight(model, batches):
            recorder.phase = "forward"
            with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
                loss = _forward(model, given)
            end = len(recorder.memory.events)
            recorder.phase = "backward"
            loss.backward()
            del loss
            recorder.note_owned(optimizer)
            kept = recorder.memory.live(end)
        recorder.phase = "optimizer"
        if max_norm is not None:
            clip_grad_norm_(trained, max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return Recorded(recorder, begin, kept)
