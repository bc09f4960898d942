"""Memory of a rank: what a training step in bf16 on CUDA holds at its peak.

The peak is the largest of some moments of the step, each a sum over what is live then: parameters and states, what
layers keep for their backward, the operations of the layer that runs (`program`), and what FSDP2 holds of its units:

    forward     that of the last layer
    loss        the loss is there, its backward makes the gradient of the head
    layer       a layer's backward: its own parameters and those of the one before it on their way, and the gradients
                of the one behind it in their reduction. The last layer, where most is kept; the one before it; the
                first, where most gradients are
    reduction   a layer's gradients, and their copy in the reduction
    embedding   the gradient of the embeddings, over the full sequence
    optimizer   all gradients
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hf_veomni.loss.head import default_chunk_tokens
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.program import B16, B32, INDEX, Live, walk_layer
from hf_veomni.planner.shape import Shape, Weight, expert_adapter, iterate_adapters

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "gathered", "loss", "communication")


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step by category, and the moment of it."""

    moment: str
    categories: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.categories.values())


def _whole(weights: Iterable[Weight], ranks: int) -> int:
    """Elements as gathered, with FSDP2's padding."""
    return sum(w.local(ranks) * ranks for w in weights)


@dataclass(frozen=True)
class _Units:
    """Bytes of FSDP2's units.

    Attributes:
        layer, experts, head, root: as gathered; experts are 0 where they are part of the layer.
        grown: of gradients in their reduction over those of gradients as the backward makes them.
        trained: whether the model's own parameters are.
        layer_trained, experts_trained: of what is trained in a layer's units, as gathered.
        parameters, optimizer, gradients: on this rank.
        layer_gradients: on this rank, of one layer.
    """

    layer: int
    experts: int
    head: int
    root: int
    grown: float
    trained: bool
    layer_trained: int
    experts_trained: int
    parameters: int
    optimizer: int
    gradients: int
    layer_gradients: int

    @classmethod
    def of(cls, shape: Shape, layout: Layout, job: Job) -> _Units:
        ranks, apart = layout.fsdp, layout.ep > 1
        every, routed = shape.experts * shape.expert, shape.experts * expert_adapter(shape, job.lora)
        dense = _whole(shape.layer, ranks) + (0 if apart else every)
        extra = _whole(iterate_adapters(shape, job.lora), ranks) + (0 if apart else routed)
        experts, more = (every // layout.ep, routed // layout.ep) if apart else (0, 0)
        outer = _whole((*shape.head, *shape.root), ranks)
        of_layer = dense // ranks + experts // layout.efsdp
        local = shape.layers * of_layer + outer // ranks
        trained = extra // ranks + more // layout.efsdp if job.lora else of_layer
        total = shape.layers * trained if job.lora else local
        full = job.lora is None
        return cls(
            layer=dense * B16 + extra * job.adapter,
            experts=experts * B16 + more * job.adapter,
            head=_whole(shape.head, ranks) * B16,
            root=_whole(shape.root, ranks) * B16,
            grown=job.reduced / (B16 if full else job.adapter),
            trained=full,
            layer_trained=dense * B16 if full else extra * job.adapter,
            experts_trained=experts * B16 if full else more * job.adapter,
            parameters=local * job.stored + (0 if full else total * job.trained),
            optimizer=2 * total * job.trained,
            gradients=total * job.trained,
            layer_gradients=trained * job.trained,
        )

    def reduced(self, size: int) -> int:
        return round(size * self.grown)


class _Step:
    """The moments of one step on one rank."""

    def __init__(self, shape: Shape, layout: Layout, job: Job) -> None:
        self.shape, self.layout, self.job = shape, layout, job
        self.units = _Units.of(shape, layout, job)
        self.tokens = layout.tokens(job)
        self.sharded = layout.fsdp > 1
        self.stream = self.tokens * shape.width * B16
        self.walk = walk_layer(shape, layout, job)
        routes = self.tokens * shape.top_k * INDEX if layout.ep > 1 else 0
        self.kept = self.stream + routes if layout.checkpointing else self.walk.saved
        self.tables = 2 * self.tokens * shape.head_width * B16  # of the rotary embeddings
        accumulates = layout.accumulation(job) > 1
        self.accumulated = self.units.gradients if accumulates else 0
        # Until the end there are the last norm's output, of the head's call, tied embeddings with their gradient, and
        # frozen embeddings of the full sequence, which checkpointing has been given.
        self.tied = self.units.head if not self.units.root else 0
        self.embedded = layout.sp * self.stream if layout.sp > 1 else 0
        frozen = layout.checkpointing and not self.units.trained
        self.held = self.tables + self.stream + (self.embedded if frozen else 0)

    def moments(self) -> Iterator[tuple[str, dict[str, int]]]:
        yield "loss", self._loss() if self.units.trained else self._frozen_loss()
        if not self.layout.checkpointing:
            yield "forward", self._forward()
        layers = self.shape.layers
        for index in sorted({layers - 1, max(layers - 2, 0), 0}, reverse=True):
            yield from self._layer(index)
        if self.units.trained:
            yield "embedding", self._embedding()
        yield "optimizer", {"gradients": self.units.gradients}

    def _below(self, layers: int) -> int:
        """What so many layers keep. Behind frozen embeddings the first norm has no backward."""
        frozen = layers and not self.units.trained and not self.layout.checkpointing
        return layers * self.kept - (2 * self.stream if frozen else 0)

    def _sharded_gradients(self, layers: int) -> int:
        """Gradients on this rank once the backward is through the head and so many layers."""
        if self.accumulated:
            return self.accumulated
        head = (
            0
            if self.tied
            else self.units.head // self.layout.fsdp * self.job.trained // B16
            if self.units.trained
            else 0
        )
        return head + layers * self.units.layer_gradients

    def _loss(self) -> dict[str, int]:
        width, units = self.shape.width, self.units
        normed = self.tokens * width * (B32 + 2 * B16)  # of the last norm
        return {
            "activations": self._below(self.shape.layers) + self.held - self.stream + normed,
            "loss": self.tokens * width * (B32 + B16) + self._block(),
            "gradients": self.accumulated + (units.head if units.trained else 0),
            "gathered": units.head if self.sharded else 0,
            "communication": units.layer + units.experts if self.sharded else 0,
        }

    def _frozen_loss(self) -> dict[str, int]:
        """The loss of a head that is not trained has its gradient in the forward."""
        width, units = self.shape.width, self.units
        return {
            "activations": self._below(self.shape.layers) + self.held + self.tokens * width * B32,
            "loss": 2 * self.stream + self._block(),
            "gradients": self.accumulated,
            "gathered": units.head if self.sharded else 0,
            "communication": units.head if self.sharded else 0,
        }

    def _forward(self) -> dict[str, int]:
        """The forward of the last layer."""
        live, unit = self.walk.forward, self.units.layer + self.units.experts
        below = self._below(self.shape.layers - 1) + self.tables + self.embedded
        return {
            "activations": below + live.activations,
            "communication": live.communication + (unit if self.sharded else 0),
            "gathered": unit + self.tied if self.sharded else 0,
            "gradients": self.accumulated,
        }

    def _block(self) -> int:
        """A block of logits and its gradient."""
        chunk = default_chunk_tokens(self.shape.vocabulary, self.stream, "cuda")
        return 2 * min(chunk, self.tokens) * self.shape.vocabulary * B16

    def _layer(self, index: int) -> Iterator[tuple[str, dict[str, int]]]:
        """Moments of the backward of a layer."""
        units, sharded = self.units, self.sharded
        apart, last = self.layout.ep > 1, index == self.shape.layers - 1
        below = self._below(index) + self.held
        outer = 0 if self.tied or not units.trained else units.reduced(units.head)
        behind = outer if last else units.reduced(units.layer_trained)
        gradients = self._sharded_gradients(self.shape.layers - 1 - index)
        ahead = (units.layer + units.experts) if index else units.root
        first, second = self.walk.first, self.walk.second

        def moment(live: Live, gathered: int, sent: int, name: str = "layer") -> tuple[str, dict[str, int]]:
            return name, {
                "activations": below + live.activations + (self.stream if self.layout.checkpointing else 0),
                "communication": live.communication + (sent if sharded else 0),
                "gathered": gathered + self.tied if sharded else 0,
                "gradients": gradients + live.gradients + (self.tied if units.trained else 0),
            }

        if self.layout.checkpointing:
            yield moment(self.walk.again, units.layer + units.experts, ahead + behind)
        yield from (moment(live, units.layer + units.experts, ahead + behind) for live in first)
        if apart:
            experts = units.reduced(units.experts_trained)
            left = min(first, key=lambda live: live.activations)
            full = Live(left.activations, 0, units.experts_trained)
            yield moment(full, units.layer, ahead + experts, "reduction")
            behind = experts or behind
        yield from (moment(live, units.layer, ahead + behind) for live in second)
        full = Live(self.stream, 0, units.layer_trained)
        yield moment(full, 0, ahead + units.reduced(units.layer_trained), "reduction")

    def _embedding(self) -> dict[str, int]:
        """The gradient of the hidden states of all tokens of the sequence, and that of the embeddings."""
        units = self.units
        full = self.layout.sp * self.stream
        root = units.root or units.head
        return {
            "activations": full + self.held,
            "gradients": self._sharded_gradients(self.shape.layers) + root,
            "gathered": root if self.sharded else 0,
            "communication": max(units.reduced(root), units.reduced(units.layer_trained)) if self.sharded else 0,
        }


def memory_of(shape: Shape, layout: Layout, job: Job) -> Memory:
    """The peak of a rank, of a step with AdamW."""
    step = _Step(shape, layout, job)
    found = []
    for moment, sizes in step.moments():
        both = {category: sizes.get(category, 0) for category in CATEGORIES}
        both["parameters"] += step.units.parameters
        both["optimizer"] += step.units.optimizer
        found.append(Memory(moment, both))
    return max(found, key=lambda memory: memory.total)
