"""Bytes that a rank sends in a micro-batch, and how long that takes; the same collectives as in docs/architecture.md.

Shapes: t tokens of this rank; H, K query and key/value heads; D head width; C hidden size; P = t * top_k pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, lcm

from hf_veomni.expert.dispatch import chunk_sizes, rows_per_token, saves_bytes
from hf_veomni.expert.forward import CHUNKS
from hf_veomni.planner.devices import Device
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.shape import Layer, Shape, Weight
from hf_veomni.sequence.pipelined import chunk_layouts
from hf_veomni.sequence.ulysses import head_layout

BYTES = 2  # bf16


@dataclass(frozen=True)
class Exchange:
    """Collectives of one axis in a micro-batch.

    Attributes:
        kind, axis, ranks: as in a dry run.
        calls: how many.
        payload: bytes of the full tensors of all calls.
        stride: between neighbours of the group, in ranks: how far the group reaches over the nodes.
        world: ranks of all groups, of which the slowest one counts.
    """

    kind: str
    axis: str
    ranks: int
    calls: int
    payload: int
    stride: int
    world: int

    @property
    def sent(self) -> int:
        if self.kind == "send":
            return self.payload
        share = self.payload * (self.ranks - 1) // self.ranks
        return 2 * share if self.kind == "all-reduce" else share

    def seconds(self, device: Device) -> float:
        """On the links of `device`. Rings leave a node on one rank's link for each rank that the node holds."""
        if self.ranks == 1:
            return 0.0
        if self.kind == "send":  # to the next stage
            inside = self.stride < device.node
            rate, latency = (device.intra_gbs, device.intra_us) if inside else (device.inter_gbs, device.inter_us)
            return self.sent / (rate * 1e9) + self.calls * latency * 1e-6
        inside = _fewest(self.ranks, self.stride, self.world, device.node)
        if inside >= self.ranks:
            return self.sent / (device.intra_gbs * 1e9) + self.calls * device.intra_us * 1e-6
        if self.kind == "all-to-all":
            leaves = self.payload * (self.ranks - inside) / self.ranks
            stays = self.payload * (inside - 1) / self.ranks
            moved = max(leaves / (device.inter_gbs * 1e9), stays / (device.intra_gbs * 1e9))
        else:
            moved = self.sent / (min(device.intra_gbs, inside * device.inter_gbs) * 1e9)
        return moved + self.calls * device.inter_us * 1e-6


@lru_cache(maxsize=4096)
def _fewest(ranks: int, stride: int, world: int, node: int) -> int:
    """Ranks of a group that share a node, where they are fewest: groups may begin in the midst of a node."""
    size, fewest = ranks * stride, ranks
    for begin in range(0, min(world, lcm(size, node)), size):
        for first in range(begin, begin + min(stride, node)):
            nodes = Counter(rank // node for rank in range(first, first + size, stride))
            fewest = min(fewest, *nodes.values())
    return fewest


def _whole(weights: Iterable[Weight], ranks: int) -> int:
    """Elements as gathered, with FSDP2's padding."""
    return sum(w.local(ranks) * ranks for w in weights)


def sent_rows(layer: Layer, ep: int) -> float:
    """Rows that a token's pairs take over the link, where routing is even."""
    if saves_bytes(layer.top_k, layer.experts, ep):
        return rows_per_token(layer.top_k, layer.experts, ep)
    return layer.top_k


def exchanges(shape: Shape, layout: Layout, job: Job) -> list[Exchange]:
    """What a rank takes part in during forward and backward of one micro-batch, but for single numbers.

    Under pairs that is the mean over the micro-batches of a step, of which two share gathers and reductions. `shape`
    is that of a stage.
    """
    found = [*_of_units(shape, layout, job)]
    if layout.sp > 1:
        found.append(_of_sequences(shape, layout, job))
    if layout.ep > 1:
        found.append(_of_experts(shape, layout, job))
    if layout.pp > 1:
        t = layout.tokens(job)
        sides = (not shape.embeds) + (not shape.ends)  # hidden states to the next one, gradients to the one before
        found.append(
            Exchange("send", "pp", layout.pp, sides, sides * t * shape.width * BYTES, layout.stage, layout.world)
        )
    return [exchange for exchange in found if exchange.ranks > 1 and exchange.payload]


def _of_units(shape: Shape, layout: Layout, job: Job) -> Iterator[Exchange]:
    """Parameters and gradients, by FSDP2."""
    n, apart = layout.fsdp, layout.ep > 1
    gathered = trained = experts = experts_trained = routed_layers = 0
    for kind, layer in enumerate(shape.kinds):
        count = shape.order.count(kind)
        alone = apart and layer.experts > 0
        every, routed = layer.experts * layer.expert, layer.experts * layer.expert_adapter(job.lora)
        dense = _whole(layer.weights, n) + (0 if alone else every)
        extra = _whole(layer.adapters(job.lora), n) + (0 if alone else routed)
        gathered += count * (BYTES * dense + layout.adapter(job) * extra)
        trained += count * job.reduced * (extra if job.lora else dense)
        if alone:
            routed_layers += count
            experts += count * (BYTES * every + layout.adapter(job) * routed) // layout.ep
            experts_trained += count * job.reduced * (routed if job.lora else every) // layout.ep
    head, root = BYTES * _whole(shape.head, n), BYTES * _whole(shape.root, n)
    reduced = 0 if job.lora else (head + root) * job.reduced // BYTES
    # The unit of norm and head stays until its backward; tied embeddings are in it. Each of a pair gathers it.
    shared, units, layers = _sharing(layout, job), (head > 0) + (root > 0), len(shape.order)
    outer = round((2 * head if layout.overlap == "pairs" else head) * shared + 2 * root * shared)
    reduced = round(reduced * shared)
    yield Exchange(
        "all-gather", "fsdp", n, round((2 * layers + units + (root > 0)) * shared),
        round(2 * gathered * shared) + outer, 1, layout.world,
    )  # fmt: skip
    yield Exchange("reduce-scatter", "fsdp", n, layers + units, round(trained * shared) + reduced, 1, layout.world)
    if experts:
        moved = layout.efsdp, round(2 * routed_layers * shared), round(2 * experts * shared)
        yield Exchange("all-gather", "efsdp", *moved, layout.ep, layout.world)
        moved = layout.efsdp, routed_layers, round(experts_trained * shared)
        yield Exchange("reduce-scatter", "efsdp", *moved, layout.ep, layout.world)
    if layout.replicate > 1:
        shards = (trained + reduced) // n + experts_trained // layout.efsdp
        calls = layers + (routed_layers if experts_trained else 0) + units
        yield Exchange("all-reduce", "dp_replicate", layout.replicate, calls, shards, n, layout.world)


def _sharing(layout: Layout, job: Job) -> float:
    """Gathers of a micro-batch, where two of a pair have them once."""
    count = layout.accumulation(job)
    return ceil(count / 2) / count if layout.overlap == "pairs" else 1


def _of_sequences(shape: Shape, layout: Layout, job: Job) -> Exchange:
    """Tokens for heads and back; values of another width than keys in an exchange of their own."""
    heads, layers, t = shape.attention, len(shape.order), layout.tokens(job)
    passes = _passes(layout)
    spans = head_layout(heads.heads, heads.key_value_heads, layout.sp).key_value  # that query heads of a rank read
    read = sum(last - first for first, last in spans)
    sent = heads.queries + read * (heads.width + heads.values)
    calls = passes * layers * (3 if heads.values != heads.width else 2)
    if layout.overlap == "chunks":
        calls *= len(chunk_layouts(head_layout(heads.heads, heads.key_value_heads, layout.sp)))
    return Exchange(
        "all-to-all", "sp", layout.sp, calls, passes * layers * (sent + heads.out) * t * BYTES, 1, layout.world
    )


def _of_experts(shape: Shape, layout: Layout, job: Job) -> Exchange:
    """Rows go there and back, and once more there in a recomputation, which ends at the experts' output; the router's
    weights there only; in the backward all the other way. In bundles it goes there, too, which row each pair is in.
    The counts go once."""
    passes, t, calls, payload = _passes(layout), layout.tokens(job), 0, 0
    sizes = chunk_sizes(t, CHUNKS if layout.overlap == "chunks" else 1)
    for kind, layer in enumerate(shape.kinds):
        layers = shape.order.count(kind) if layer.experts else 0
        pairs, each = t * layer.top_k, sent_rows(layer, layout.ep)
        bundled = each < layer.top_k
        rows, weights = int(t * each) * layer.width * BYTES, pairs * (4 if layer.wide else BYTES)
        sends = 3 * passes - layout.checkpointing + bundled * (passes - 1)
        calls += layers * (len(sizes) * sends + 1)
        # What comes after the experts is computed again where something behind it is saved: an MLP beside them.
        once = sizes[-1] / t if layout.checkpointing and not layer.shared else 0
        payload += layers * (int((2 * passes - once) * rows) + passes * weights + 8 * layer.experts)
        payload += layers * bundled * ((passes - 1) * pairs * 4 + 8 * layout.ep)
    return Exchange("all-to-all", "ep", layout.ep, calls, payload, 1, layout.world)


def _passes(layout: Layout) -> int:
    return 3 if layout.checkpointing else 2  # forward, again in the recomputation, and the backward
