"""Bytes that a rank sends in a micro-batch, and how long that takes; the same collectives as in docs/architecture.md.

Shapes: t tokens of this rank; H, K query and key/value heads; D head width; C hidden size; P = t * top_k pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_veomni.expert.dispatch import chunk_sizes, rows_per_token, saves_bytes
from hf_veomni.expert.forward import CHUNKS
from hf_veomni.planner.devices import Device
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.shape import Shape, Weight, expert_adapter, iterate_adapters
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
    """

    kind: str
    axis: str
    ranks: int
    calls: int
    payload: int
    stride: int

    @property
    def sent(self) -> int:
        share = self.payload * (self.ranks - 1) // self.ranks
        return 2 * share if self.kind == "all-reduce" else share

    def seconds(self, device: Device) -> float:
        """On the links of `device`. Rings leave a node on one rank's link for each rank that the node holds."""
        if self.ranks == 1:
            return 0.0
        inside = max(1, min(self.ranks, device.node // self.stride))  # ranks of the group in one node
        if inside >= self.ranks:
            return self.sent / (device.intra_gbs * 1e9) + self.calls * device.intra_us * 1e-6
        if self.kind == "all-to-all":
            leaves = self.payload * (self.ranks - inside) / self.ranks
            stays = self.payload * (inside - 1) / self.ranks
            moved = max(leaves / (device.inter_gbs * 1e9), stays / (device.intra_gbs * 1e9))
        else:
            moved = self.sent / (min(device.intra_gbs, inside * device.inter_gbs) * 1e9)
        return moved + self.calls * device.inter_us * 1e-6


def _whole(weights: Iterable[Weight], ranks: int) -> int:
    """Elements as gathered, with FSDP2's padding."""
    return sum(w.local(ranks) * ranks for w in weights)


def sent_rows(shape: Shape, ep: int) -> float:
    """Rows that a token's pairs take over the link, where routing is even."""
    if saves_bytes(shape.top_k, shape.experts, ep):
        return rows_per_token(shape.top_k, shape.experts, ep)
    return shape.top_k


def exchanges(shape: Shape, layout: Layout, job: Job) -> list[Exchange]:
    """What a rank takes part in during forward and backward of one micro-batch, but for single numbers."""
    layers, n = shape.layers, layout.fsdp
    apart = layout.ep > 1
    every = shape.experts * shape.expert
    dense = _whole(shape.layer, n) + (0 if apart else every)
    routed = shape.experts * expert_adapter(shape, job.lora)
    extra = _whole(iterate_adapters(shape, job.lora), n) + (0 if apart else routed)
    layer, experts = BYTES * dense + job.adapter * extra, (BYTES * every + job.adapter * routed) // layout.ep
    experts = experts if apart else 0
    head, root = BYTES * _whole(shape.head, n), BYTES * _whole(shape.root, n)
    trained = job.reduced * (extra if job.lora else dense)
    reduced = 0 if job.lora else (head + root) * job.reduced // BYTES
    expert_trained = job.reduced * (routed if job.lora else every) // layout.ep if apart else 0
    # The unit of norm and head stays until its backward; tied embeddings are in it.
    outer, units = head + 2 * root, (head > 0) + (root > 0)
    found = [
        Exchange("all-gather", "fsdp", n, 2 * layers + units + (root > 0), 2 * layers * layer + outer, 1),
        Exchange("reduce-scatter", "fsdp", n, layers + units, layers * trained + reduced, 1),
    ]
    passes = 3 if layout.checkpointing else 2  # forward, again in the recomputation, and the backward
    if layout.sp > 1:
        t = layout.tokens(job)
        keys = head_layout(shape.heads, shape.key_value_heads, layout.sp).key_value  # that query heads of a rank read
        sent = (shape.heads + 2 * sum(last - first for first, last in keys)) * shape.head_width * t * BYTES
        back = shape.queries * t * BYTES
        found.append(Exchange("all-to-all", "sp", layout.sp, 2 * passes * layers, passes * layers * (sent + back), 1))
    if layout.ep > 1:
        # Rows go there and back, and once more there in a recomputation, which ends at the experts' output; the
        # router's weights there only; in the backward all the other way. The counts go once.
        pairs = layout.tokens(job) * shape.top_k
        each = sent_rows(shape, layout.ep)
        bundled = each < shape.top_k  # which row a pair is in goes there beside the weights
        rows, weights = int(layout.tokens(job) * each) * shape.width * BYTES, pairs * (4 if shape.wide else BYTES)
        calls = layers * (3 * passes + 1 - layout.checkpointing + bundled * (passes - 1))
        chunks = CHUNKS if layout.overlap == "chunks" else 1
        once = chunk_sizes(layout.tokens(job), chunks)[-1] / layout.tokens(job) if layout.checkpointing else 0
        payload = layers * (int((2 * passes - once) * rows) + passes * weights + 8 * shape.experts)
        payload += layers * bundled * ((passes - 1) * pairs * 4 + 8 * layout.ep)
        found.append(Exchange("all-to-all", "ep", layout.ep, calls, payload, 1))
        found += [
            Exchange("all-gather", "efsdp", layout.efsdp, 2 * layers, 2 * layers * experts, layout.ep),
            Exchange("reduce-scatter", "efsdp", layout.efsdp, layers, layers * expert_trained, layout.ep),
        ]
    if layout.replicate > 1:
        shards = (layers * trained + reduced) // n + layers * expert_trained // layout.efsdp
        calls = layers * (2 if expert_trained else 1) + units
        found.append(Exchange("all-reduce", "dp_replicate", layout.replicate, calls, shards, n))
    return [exchange for exchange in found if exchange.ranks > 1 and exchange.payload]
