"""Memory of a rank: what a training step in bf16 on CUDA holds at its peak.

The peak is the largest of some moments of the step, each a sum over what is live then: parameters and states, what
layers keep for their backward, the operations of the layer that runs (`program`), and what FSDP2 holds of its units:

    forward     that of the last layer
    loss        the loss is there, its backward makes the gradient of the head
    layer       a layer's backward: its own parameters and those of the one before it on their way, and the gradients
                of the one behind it in their reduction. The last layer, where most is kept; the one before it; the
                first, where most gradients are
    reduction   gradients of a layer, or of the embeddings, and their copies in the reduction
    embedding   the gradient of the embeddings, over the full sequence
    optimizer   all gradients; fused AdamW makes nothing else
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hf_veomni.loss.head import default_chunk_tokens
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.operations import B16, B32, INDEX, walk_layer
from hf_veomni.planner.program import Live
from hf_veomni.planner.shape import Layer, Shape, Weight
from hf_veomni.planner.stages import cut_shape

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
class _Unit:
    """Bytes of FSDP2's units of a layer.

    Attributes:
        whole, experts: as gathered; experts are 0 where they are part of the layer.
        trained, experts_trained: of these, what is trained.
        gradients: on this rank.
        elements, extra: of the model's own parameters on this rank, and of adapters.
    """

    whole: int
    experts: int
    trained: int
    experts_trained: int
    gradients: int
    elements: int
    extra: int

    @classmethod
    def of(cls, layer: Layer, layout: Layout, job: Job) -> _Unit:
        ranks, apart = layout.fsdp, layout.ep > 1 and layer.experts > 0
        every, routed = layer.experts * layer.expert, layer.experts * layer.expert_adapter(job.lora)
        dense = _whole(layer.weights, ranks) + (0 if apart else every)
        extra = _whole(layer.adapters(job.lora), ranks) + (0 if apart else routed)
        experts, more = (every // layout.ep, routed // layout.ep) if apart else (0, 0)
        elements = dense // ranks + experts // layout.efsdp
        adapters = extra // ranks + more // layout.efsdp
        full, size, weight = job.lora is None, layout.adapter(job), layout.hidden(job)
        return cls(
            whole=dense * weight + extra * size,
            experts=experts * weight + more * size,
            trained=dense * weight if full else extra * size,
            experts_trained=experts * weight if full else more * size,
            gradients=(elements if full else adapters) * job.trained,
            elements=elements,
            extra=adapters,
        )

    @property
    def both(self) -> int:
        return self.whole + self.experts


class _Held(NamedTuple):
    """Bytes of FSDP2 for a layer: its gathered parameters, and the reduction that was the last one."""

    whole: int
    reduced: int


class _Step:
    """The moments of one step on one rank.

    Attributes:
        waiting: bytes that other micro-batches in flight keep.
    """

    def __init__(self, shape: Shape, layout: Layout, job: Job, held: int = 1) -> None:
        """
        Args:
            shape: of what the rank's stage has.
            held: micro-batches in flight.
        """
        self.shape, self.layout, self.job = shape, layout, job
        self.trained = job.lora is None
        self.hidden = layout.hidden(job)
        self.size = self.hidden if self.trained else layout.adapter(job)  # of an element of a full gradient
        self.wrapped, self.sharded = layout.wrapped, layout.fsdp > 1
        self.flights = 2 if layout.overlap == "pairs" else 1  # sequences at once
        self.tokens = layout.sequence(job)
        self.states = self.flights * self.tokens * shape.width  # numbers of the hidden states
        self.stream = self.states * self.hidden
        self.units = [_Unit.of(layer, layout, job) for layer in shape.kinds]
        self.walks = [walk_layer(layer, shape.attention, layout, job, self.tokens) for layer in shape.kinds]
        self.order = shape.order
        self.kept = [self._keeps(kind) for kind in range(len(shape.kinds))]
        self.sums = [0]  # that the layers below keep
        self.behind = [0]  # gradients on this rank of as many layers from the end
        for kind, other in zip(self.order, reversed(self.order), strict=True):
            self.sums.append(self.sums[-1] + self.kept[kind])
            self.behind.append(self.behind[-1] + self.units[other].gradients)
        self.head, self.root = (_whole(weights, layout.fsdp) * self.hidden for weights in (shape.head, shape.root))
        outer = (self.head + self.root) // self.hidden // layout.fsdp
        local = sum(self.units[kind].elements for kind in self.order) + outer
        extra = sum(self.units[kind].extra for kind in self.order)
        trained = local if self.trained else extra
        self.parameters = local * job.stored + (0 if self.trained else extra * job.trained)
        self.optimizer, self.gradients = 2 * trained * job.trained, trained * job.trained
        self.accumulated = self.gradients if layout.accumulation(job) > self.flights else 0
        # Until the backward's end FSDP2 holds what an all-reduce has worked on, where it is not the gradient itself.
        holds = layout.replicate > 1 and (job.reduced != job.trained or self.accumulated > 0)
        self.after_all_reduce = job.reduced / job.trained if holds else 0.0
        # Until the end there are the last norm's output, of the head's call, tied embeddings with their gradient, and
        # frozen embeddings of the full sequence, which checkpointing has been given.
        tables = 2 * self.flights * self.tokens * shape.attention.rotated * self.hidden  # of the rotary embeddings
        self.tied = self.head if shape.tied and layout.pp == 1 else 0
        self.embedded = layout.sp * self.stream if layout.sp > 1 and shape.embeds else 0
        frozen = layout.checkpointing and not self.trained
        self.tables = tables
        self.held = tables + self.stream + (self.embedded if frozen else 0)
        # A message is held until the window ends.
        messages = layout.accumulation(job) * self.stream * ((not shape.embeds) + (not shape.ends))
        self.waiting = (held - 1) * (self.sums[-1] + tables + self.stream) + (messages if layout.pp > 1 else 0)

    def _keeps(self, kind: int) -> int:
        """Bytes that a layer keeps for its backward."""
        if not self.layout.checkpointing:
            return self.flights * self.walks[kind].saved
        routes = self.tokens * self.shape.kinds[kind].top_k * INDEX if self.layout.ep > 1 else 0
        return self.stream + self.flights * routes

    def _reduced(self, size: int) -> int:
        """Full gradients of so many bytes as a reduction takes them."""
        return size // self.size * self.job.reduced

    def _reduction(self, size: int, ranks: int) -> int:
        """What a reduction needs beside these gradients: their copy; or, without them, this and what comes out of it,
        which on few ranks is more."""
        copy, job = self._reduced(size), self.job
        own = size // self.size * job.trained if job.trained != job.reduced else 0
        return max(copy, copy + (copy + own) // ranks - size)

    def moments(self) -> Iterator[tuple[str, dict[str, int]]]:
        if self.shape.ends:
            yield "loss", self._loss() if self.trained else self._frozen_loss()
            if self.trained and self._cached():
                yield "forward", self._forward_loss()
        if not self.layout.checkpointing:
            yield "forward", self._forward()
        for index in self._edges():
            yield from self._layer(index)
        if self.trained and self.shape.embeds:
            yield from self._embedding()
        yield "optimizer", {"gradients": self.gradients}

    def _edges(self) -> list[int]:
        """Layers of which one may have the peak: the first and the last one of each kind between its neighbours."""
        found: dict[tuple, tuple[int, int]] = {}
        order = self.shape.order
        for index in range(len(order)):
            around = (index > 0 and order[index - 1], order[index], index + 1 < len(order) and order[index + 1])
            key = (*around, index == 0, index + 1 == len(order))
            found[key] = (found.get(key, (index, index))[0], index)
        return sorted({index for pair in found.values() for index in pair}, reverse=True)

    def _below(self, layers: int) -> int:
        """What so many layers keep. Behind frozen embeddings the first norm has no backward."""
        frozen = layers and not self.trained and not self.layout.checkpointing and self.shape.embeds
        return self.sums[layers] - (self.states * B32 if frozen else 0) + self.waiting

    def _sharded_gradients(self, layers: int) -> int:
        """Gradients on this rank once the backward is through the head and so many layers."""
        if self.accumulated:
            return self.accumulated
        return self._backward_gradients(layers)

    def _backward_gradients(self, layers: int) -> int:
        """Of these, what this micro-batch's backward has made."""
        head = 0 if self.tied or not self.trained else self.head // self.layout.fsdp * self.job.trained // self.hidden
        return head + self.behind[layers]

    def _all_reduced(self, layers: int) -> int:
        return round(self.after_all_reduce * self._backward_gradients(layers))

    def _loss(self) -> dict[str, int]:
        last = self.units[self.order[-1]]
        return {
            "activations": self._normed(),
            "loss": self.states * (B32 + self.hidden) + self._block() + self._loss_casts(),
            "gradients": self.accumulated + self.flights * (self.head if self.trained else 0),
            "gathered": self.head if self.wrapped else 0,
            "communication": last.both if self.sharded else 0,
        }

    def _normed(self) -> int:
        """What the layers and the last norm keep."""
        return self._below(len(self.order)) + self.held - self.stream + self.states * (B32 + 2 * self.hidden)

    def _loss_casts(self) -> int:
        """Copies in bf16 of hidden states in fp32, and of a block of the head's weight."""
        if self.hidden == B16:
            return 0
        classes = self._block() // 2 // B16 // (self.states // self.shape.width)
        return self.states * B16 + classes * self.shape.width * B16

    def _cast_head(self) -> int:
        """The head's weight in bf16, where it is in fp32."""
        return self.head // self.hidden * B16 if self.hidden == B32 else 0

    def _cached(self) -> int:
        """Copies in bf16 that autocast keeps until the end of the forward, beside what is kept for the backward."""
        if self.hidden == B16 or not self.layout.checkpointing:
            return 0
        if not self.trained:
            return sum(w.size for layer in self.shape.layers for w in layer.adapters(self.job.lora)) * B16
        return sum(layer.matmuls for layer in self.shape.layers) * B16

    def _forward_loss(self) -> dict[str, int]:
        """The forward of the loss of a head that is trained, which only autocast's copies make a peak."""
        loss = self.stream + self._cast_head() + self._block() // 2
        return {"activations": self._normed() + self._cached(), "loss": loss, "gradients": self.accumulated}

    def _frozen_loss(self) -> dict[str, int]:
        """The loss of a head that is not trained has its gradient in the forward."""
        return {
            "activations": self._below(len(self.order)) + self.held + self.states * B32 + self._cached(),
            "loss": 2 * self.stream + self._block() + self._cast_head(),
            "gradients": self.accumulated,
            "gathered": self.head if self.wrapped else 0,
            "communication": self.head if self.sharded else 0,
        }

    def _forward(self) -> dict[str, int]:
        """The forward of the last layer."""
        last = self.order[-1]
        live, unit = self.walks[last].forward, self.units[last].both
        below = self._below(len(self.order) - 1) + self.tables + self.embedded
        return {
            "activations": below + self.flights * live.activations,
            "communication": self.flights * live.communication + (unit if self.sharded else 0),
            "gathered": unit + self.tied if self.wrapped else 0,
            "gradients": self.accumulated,
        }

    def _block(self) -> int:
        """A block of logits and its gradient."""
        stream = self.stream // self.flights
        chunk = default_chunk_tokens(self.shape.vocabulary, stream, "cuda")
        return 2 * min(chunk, self.tokens) * self.shape.vocabulary * B16

    def _layer(self, index: int) -> Iterator[tuple[str, dict[str, int]]]:
        """Moments of the backward of a layer."""
        kind = self.order[index]
        unit, walk, flights = self.units[kind], self.walks[kind], self.flights
        below = self._below(index) + self.held
        if index + 1 == len(self.order):
            behind = 0 if self.tied or not self.trained else self._reduced(self.head)
        else:
            behind = self._reduced(self.units[self.order[index + 1]].trained)
        gradients = self._sharded_gradients(len(self.order) - 1 - index)
        reduced = self._all_reduced(len(self.order) - 1 - index)
        ahead = (self.units[self.order[index - 1]].both if index else self.root) if self.sharded else 0

        def moment(live: Live, gathered: int, sent: int, name: str = "layer") -> tuple[str, dict[str, int]]:
            again = self.stream if self.layout.checkpointing and self.hidden == B16 else 0  # else the layer saves it
            return name, {
                "activations": below + live.activations + again,
                "communication": live.communication + (reduced + sent if self.wrapped else 0),
                "gathered": gathered + self.tied if self.wrapped else 0,
                "gradients": gradients + live.gradients + flights * (self.tied if self.trained else 0),
            }

        if self.layout.checkpointing and flights == 1:
            yield moment(walk.again, unit.both, ahead + behind)
        if flights == 2:
            left, held = self._behind(index)
            waits = Live(walk.again.activations + walk.saved, walk.again.communication)
            for live in (*walk.opening, *([waits] if self.layout.checkpointing else [])):
                both = left._replace(gradients=live.gradients + left.gradients)
                yield moment(both.beside(live), unit.both + held.whole, ahead + held.reduced)
        yield from (moment(live, unit.both, ahead + behind) for live in walk.first)
        if unit.experts:
            experts, ranks = self._reduced(unit.experts_trained), self.layout.efsdp
            left = min(walk.first, key=lambda live: live.activations)
            full = Live(left.activations, 0, unit.experts_trained)
            yield moment(full, unit.whole, ahead + self._reduction(unit.experts_trained, ranks), "reduction")
            behind = experts or behind
        yield from (moment(live, unit.whole, ahead + behind) for live in walk.second)
        full = Live(self.stream // flights, 0, unit.trained)
        yield moment(full, 0, ahead + self._reduction(unit.trained, self.layout.fsdp), "reduction")

    def _behind(self, index: int) -> tuple[Live, _Held]:
        """What the first of two sequences still has of the layer behind, when the second one is through it, and what
        FSDP2 holds for it."""
        if index + 1 == len(self.order):
            head = self._reduced(self.head) if self.trained and not self.tied else 0
            return Live(self.stream // 2), _Held(0, head)
        unit, rest = self.units[self.order[index + 1]], self.walks[self.order[index + 1]].rest
        after = self.units[self.order[index + 2]].trained if index + 2 < len(self.order) else self.head * self.trained
        sent = self._reduced(unit.experts_trained or after)
        return rest._replace(gradients=unit.trained), _Held(unit.whole, sent)

    def _embedding(self) -> Iterator[tuple[str, dict[str, int]]]:
        """The gradient of the hidden states of all tokens of the sequence, and that of the embeddings."""
        root, layers = self.tied or self.root, len(self.order)
        first = self._reduced(self.units[self.order[0]].trained)
        sizes = {
            "activations": self.layout.sp * self.stream + self.held + self.waiting,
            "gradients": self._sharded_gradients(layers) + self.flights * root,
        }
        if not self.wrapped:
            yield "embedding", sizes
            return
        reduced = self._all_reduced(layers)
        yield "embedding", {**sizes, "gathered": root, "communication": reduced + max(self._reduced(root), first)}
        yield "reduction", {**sizes, "communication": reduced + self._reduction(root, self.layout.fsdp)}


def stages_of(shape: Shape, layout: Layout, job: Job) -> list[Memory]:
    """The peak of a rank, of a step with AdamW: of the first stage, the second one, and the last."""
    peaks = []
    for stage in sorted({0, min(1, layout.pp - 1), layout.pp - 1}):
        held = min(layout.pp - stage, layout.accumulation(job))
        step = _Step(cut_shape(shape, layout.pp)[stage], layout, job, held)
        found = []
        for moment, sizes in step.moments():
            both = {category: sizes.get(category, 0) for category in CATEGORIES}
            both["parameters"] += step.parameters
            both["optimizer"] += step.optimizer
            found.append(Memory(moment, both))
        peaks.append(max(found, key=lambda memory: memory.total))
    return peaks


def memory_of(shape: Shape, layout: Layout, job: Job) -> Memory:
    """The peak of a rank of the fullest stage."""
    return max(stages_of(shape, layout, job), key=lambda memory: memory.total)
