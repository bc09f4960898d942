"""Every layout of a world for a model: what fits, ranked by predicted speed, and what the others are over by."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hf_veomni.errors import UnsupportedError
from hf_veomni.hf.build import load_config
from hf_veomni.plan import nearest
from hf_veomni.planner.devices import Device, find_device
from hf_veomni.planner.layout import Job, Layout, layouts
from hf_veomni.planner.memory import Memory, memory_of
from hf_veomni.planner.shape import Shape
from hf_veomni.planner.stages import cut_shape
from hf_veomni.planner.time import Time, time_of
from hf_veomni.planner.traffic import Exchange, exchanges

GIB = 2**30
_LEFT_OUT = ("pp", "pairs", "chunks")
# Outside of tensors: CUDA's context and libraries (about 0.7 GiB), buffers of NCCL for each communicator, and what the
# allocator cannot use.
RESERVED_GIB, COMMUNICATOR_GIB, FRAGMENTED = 1.5, 0.25, 0.03


@dataclass(frozen=True)
class Entry:
    """One layout with what it takes.

    Attributes:
        reserved: bytes beside tensors, see `RESERVED_GIB`.
        over: bytes above what the device has; 0 or less fits.
        loading: bytes of tensors while a model that was loaded in full is sharded: its weights, which `prepare_omni`
            moves to the device first, and their shards.
        tokens_per_second: predicted, of all ranks.
    """

    layout: Layout
    memory: Memory
    time: Time
    reserved: int
    over: int
    tokens_per_second: float
    exchanges: tuple[Exchange, ...]
    loading: int

    @property
    def fits(self) -> bool:
        return self.over <= 0


@dataclass(frozen=True)
class Plans:
    """The answer of `plan_layouts`: entries that fit, fastest first, then the others, the nearest to fit first."""

    shape: Shape
    device: Device
    world_size: int
    job: Job
    entries: tuple[Entry, ...]

    @property
    def fitting(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.fits)

    @property
    def best(self) -> Entry:
        """The fastest that fits.

        Raises:
            UnsupportedError: none does; the message says what comes nearest.
        """
        if not self.entries[0].fits:
            near = self.entries[0]
            raise UnsupportedError(
                f"No layout of {self.world_size} ranks of {self.device.memory_gib} GiB holds {self.shape.name} at "
                f"{self.job.context} tokens: '{near.layout}' comes nearest and is over by {near.over / GIB:.1f} GiB, "
                f"with {near.memory.total / GIB:.1f} GiB of tensors ({_largest(near.memory)}). Take more ranks, a "
                "shorter context, or LoRA."
            )
        return self.entries[0]

    def find(self, layout: Layout) -> Entry:
        """The entry of a layout, also of one that was not asked for.

        Raises:
            ValueError: it is none of this world's.
        """
        found = next((entry for entry in self.entries if entry.layout == layout), None)
        if found is None and layout not in layouts(self.shape, self.world_size):
            raise ValueError(f"'{layout}' is no layout of {self.world_size} ranks for {self.shape.name}.")
        return found or _entry(self.shape, layout, self.job, self.device)

    def loads(self, entry: Entry) -> bool:
        """Whether a model loaded in full can be sharded on the device; else each rank has to read its part."""
        return entry.loading + entry.reserved <= round(self.device.memory_gib * GIB)

    def mfu(self, entry: Entry) -> float:
        """Model FLOPs over what the device could do by its data sheet, in the predicted time."""
        return entry.time.flops / entry.time.seconds / (self.device.peak_tflops * 1e12)


def _largest(memory: Memory) -> str:
    name, size = max(memory.categories.items(), key=lambda item: item[1])
    return f"{size / GIB:.1f} of {name}"


def plan_layouts(
    model: str | os.PathLike[str] | Any,
    world_size: int,
    device: str | os.PathLike[str] | Device,
    *,
    context: int,
    document: int | None = None,
    batch: int | None = None,
    accumulation: int = 1,
    lora: int | None = None,
    mixed_precision: bool = False,
    fp32: bool = False,
    without: Collection[str] = (),
) -> Plans:
    """Memory and time of every layout of a world, by formulas.

    Args:
        model: Hub id, folder or path of a config.json, or a config.
        device: short name in the table of devices, or a yaml file with values of one's own.
        context: tokens of a packed sequence, which a data rank takes at a time.
        document: tokens of the longest documents in it; None is one document a sequence.
        batch: packed sequences of an optimizer step over all ranks; None is `accumulation` on each data rank.
        accumulation: micro-batches of a step.
        lora: rank of LoRA adapters on all linear layers; None trains everything.
        mixed_precision: bf16 autocast and bf16 gathers, as the Trainer with `bf16=True`: gradients are reduced in
            fp32.
        fp32: parameters, gradients and states of the optimizer are in fp32, with `mixed_precision`.
        without: what layouts are not to have: "pp" (pipeline stages), "pairs", "chunks" (overlap).

    Raises:
        ValueError: a size that is no positive integer, an unknown device, documents beyond the context or the model's.
        UnsupportedError: a model without shard points, or with layers that the formulas do not describe.
    """
    _check_sizes(
        world_size=world_size, context=context, document=document, batch=batch, accumulation=accumulation, lora=lora
    )
    _check_wish(context, document, mixed_precision, fp32, without)
    found = find_device(device)
    shape = Shape.of(load_config(model))
    job = Job(context, document or context, batch, accumulation, lora, mixed_precision, fp32)
    if shape.context and job.document > shape.context:
        raise ValueError(
            f"`document` ({job.document}) is longer than the model's context ({shape.context}): give the length of "
            "the longest document in a sequence, or change `max_position_embeddings` in the config."
        )
    wanted = [layout for layout in layouts(shape, world_size) if layout.runs(job) and not layout.has(without)]
    wanted = _leave_out_experts_in_fp32(shape, job, wanted)
    entries = [_entry(shape, layout, job, found) for layout in wanted]
    entries.sort(key=lambda e: (not e.fits, -e.tokens_per_second if e.fits else e.over))
    return Plans(shape, found, world_size, job, tuple(entries))


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` ({value!r}) must be a positive integer.")


def _check_wish(
    context: int, document: int | None, mixed_precision: bool, fp32: bool, without: Collection[str]
) -> None:
    if fp32 and not mixed_precision:
        raise ValueError(
            "`fp32` (True) needs `mixed_precision`: the formulas are for a computation in bf16. A dry run takes "
            "another dtype."
        )
    for name in without:
        if name not in _LEFT_OUT:
            raise ValueError(f"`without` has '{name}', which is unknown: {nearest(name, _LEFT_OUT)}.")
    if document is not None and document > context:
        raise ValueError(
            f"`document` ({document}) must not be longer than `context` ({context}), the packed sequence that it is "
            "in: take a longer context, or shorter documents."
        )


def _leave_out_experts_in_fp32(shape: Shape, job: Job, wanted: list[Layout]) -> list[Layout]:
    """Without layouts where transformers' grouped matmuls get fp32: autocast knows none, and a rank alone has no FSDP2
    to cast the weights. The package's own, which run under adapters, cast them.

    Raises:
        UnsupportedError: nothing is left.
    """
    left = [layout for layout in wanted if job.lora or not shape.experts or layout.hidden(job) == 2]
    if wanted and not left:
        raise UnsupportedError(
            f"Weights in fp32 (`fp32`, True) have {shape.name} compute its experts in fp32 on a rank alone, where "
            "nobody casts them, and the formulas are for a computation in bf16: load the weights in bf16, train "
            "adapters (`lora`), or take more ranks."
        )
    return left


def _entry(shape: Shape, layout: Layout, job: Job, device: Device) -> Entry:
    memory, time = memory_of(shape, layout, job), time_of(shape, layout, job, device)
    stages = cut_shape(shape, layout.pp)
    sent = tuple(exchanges(stages[min(1, layout.pp - 1)], layout, job))
    groups = len({exchange.axis for exchange in sent})
    reserved = round((RESERVED_GIB + groups * COMMUNICATOR_GIB) * GIB + FRAGMENTED * memory.total)
    over = memory.total + reserved - round(device.memory_gib * GIB)
    sequences = layout.data * layout.accumulation(job) if job.batch is None else job.batch
    whole = max(stage.total for stage in stages) * job.stored
    loading = whole + (memory.categories["parameters"] if layout.stage > 1 else 0)
    return Entry(layout, memory, time, reserved, over, sequences * job.context / time.seconds, sent, loading)
