"""How long a step takes, by formulas: what the device achieves, and what of the communication nothing hides.

    matmuls     2 FLOP a weight and token, three times (forward, two in the backward), four with checkpointing
    attention   4 A FLOP a pair of tokens that see each other; its backward is 2.5 forwards
    rest        norms, activations, rope, routing: bytes through the device's memory
    exchanges   of tokens (sp, ep): exposed, or in chunks what attention or experts do not hide. Of parameters and
                gradients (FSDP2): hidden behind the layer that computes meanwhile, exposed where they take longer.
                Under pairs the other sequence computes meanwhile
    stages      m micro-batches on p stages: as long as m + p - 1 of them on one stage

The constants of the rest were measured on an H100 (benchmarks/results/on_gpu_nvidia-h100-80gb-hbm3.json, phases of the
dense step and of the step with experts), of which the formulas then make the measured step times within 15 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hf_veomni.expert.dispatch import chunk_sizes
from hf_veomni.expert.forward import CHUNKS
from hf_veomni.planner.devices import Device
from hf_veomni.planner.exposure import Border, Chunked, Segment, bare_chunks, bare_pairs
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.shape import Shape
from hf_veomni.planner.stages import cut_shape
from hf_veomni.planner.traffic import BYTES, Exchange, exchanges
from hf_veomni.sequence.pipelined import chunk_layouts
from hf_veomni.sequence.ulysses import head_layout

# Bytes through memory in forward and backward: for each token, layer and hidden unit; each pair and hidden unit; each
# unit of queries and keys that are normed. And for each byte of a trained parameter in the optimizer.
_REST, _PAIR, _NORMED, _OPTIMIZER = 360, 90, 135, 11
_MATMUL_SHARE, _LOSS_SHARE = 0.9, 0.6  # of the rate of large matmuls, in a layer and in the loss
_RECOMPUTED = 4 / 3


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step.

    Attributes:
        parts: "matmul", "attention", "rest", "loss", "optimizer"; "sp", "ep", "fsdp", "pp": exposed communication;
            "bubble": what a stage of a pipeline waits for the others.
        hidden: seconds of communication that computation hides.
        flops: model FLOPs of a rank, without recomputation.
    """

    parts: dict[str, float]
    hidden: float
    flops: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def time_of(shape: Shape, layout: Layout, job: Job, device: Device) -> Time:
    """The time of a step, of which each rank does its share; routing of experts is balanced.

    A pipeline's stages run all micro-batches one after the other, at the pace of the slowest one, whose parts are
    given: `bubble` is what it waits for the others in the first and the last ones, `pp` the ways between stages.
    """
    steps = layout.accumulation(job)
    stages = cut_shape(shape, layout.pp)
    found = [_micro_batch(stage, layout, job, device) for stage in stages]
    slowest = max(found, key=lambda stage: stage.seconds)
    parts = {name: steps * value for name, value in slowest.parts.items()}
    if layout.pp > 1:
        parts["bubble"] = sum(stage.seconds for stage in found) - slowest.seconds
        size = layout.tokens(job) * shape.width * BYTES
        across = Exchange("send", "pp", layout.pp, 1, size, layout.stage, layout.world)
        parts["pp"] = _ways_between(layout.pp, steps) * across.seconds(device)
    trained = max(_trained(stage, layout, job) for stage in stages)
    parts["optimizer"] = _OPTIMIZER * job.trained * trained / (device.memory_gbs * 1e9)
    flops = steps * sum(stage.flops for stage in found) / layout.pp
    return Time(parts, steps * slowest.hidden, flops)


def _ways_between(stages: int, count: int) -> int:
    """Ways from stage to stage that all micro-batches take together, one after the other.

    The first one goes through all stages, and the last one back. k stages at the end have k micro-batches in flight,
    so the last stage gets micro-batch i only when micro-batch i - k is through all of these and back: 2 (k - 1) ways.
    """
    rounds, left = divmod(count - 1, stages)
    return 2 * (stages - 1) * (1 + rounds) + 2 * max(0, left - 1)


class _Work(NamedTuple):
    """Seconds of the forwards of all layers for a micro-batch."""

    matmul: float
    attention: float
    experts: float
    rest: float


def _micro_batch(shape: Shape, layout: Layout, job: Job, device: Device) -> Time:
    """One micro-batch of a stage, without the optimizer."""
    t, again = layout.tokens(job), 1 if layout.checkpointing else 0
    times = 2 if job.lora else 3  # frozen weights have no gradient
    rate, moved = device.matmul_tflops * 1e12, device.memory_gbs * 1e9
    heads, layers = shape.attention, len(shape.order)
    fullest = max(last - first for first, last in head_layout(heads.heads, heads.key_value_heads, layout.sp).query)
    dense = routed = bytes_ = 0.0
    for kind, layer in enumerate(shape.kinds):
        count = shape.order.count(kind)
        dense += count * (layer.matmuls + 3 / 2 * sum(w.size for w in layer.adapters(job.lora)))
        routed += count * layer.top_k * (layer.expert + 3 / 2 * layer.expert_adapter(job.lora))
        bytes_ += count * (_REST + _PAIR * layer.top_k) * layer.width
    bytes_ += layers * _NORMED * (heads.queries + heads.keys) if heads.normed else 0
    matmul = 2 * t * (times + again) * dense / (rate * _MATMUL_SHARE)
    experts = 2 * t * (times + again) * routed / (device.grouped_tflops * 1e12)
    # The kernel has values as wide as keys; what counts as work are their own columns.
    seen = 2 * sum(_pairs(job, window) for window in shape.windows)
    speed = device.whole_tflops if job.document >= job.context else device.attention_tflops
    attention = 2 * fullest * heads.width * seen * (3.5 + again) / (speed * 1e12)
    forward = (heads.queries + heads.out) * seen / layout.sp
    rest = t * bytes_ * (_RECOMPUTED if again else 1) / moved
    head = 2 * t * shape.embedding if shape.ends else 0
    loss = times * head / (rate * _LOSS_SHARE)
    flops = times * (2 * t * (dense + routed) + forward + head)
    parts = {"matmul": matmul + experts, "attention": attention, "rest": rest, "loss": loss}
    work = _Work(matmul / (times + again), attention / (3.5 + again), experts / (times + again), rest / (3 + again))
    exposed, hidden = _exposed(shape, layout, job, device, work, matmul + experts + attention + rest)
    return Time({**parts, **exposed}, hidden, flops)


def _exposed(
    shape: Shape, layout: Layout, job: Job, device: Device, work: _Work, computed: float
) -> tuple[dict[str, float], float]:
    """Seconds of communication of a micro-batch that nothing hides, by axis, and those that are hidden."""
    tokens, units = {"sp": 0.0, "ep": 0.0}, 0.0
    for exchange in exchanges(shape, layout, job):
        if exchange.axis in tokens:
            tokens[exchange.axis] += exchange.seconds(device)
        elif exchange.axis != "pp":
            units += exchange.seconds(device)
    exposed = tokens
    if (
        layout.checkpointing and tokens["ep"]
    ):  # the gradient of a layer's last exchange travels under its recomputation
        forward = work.matmul + work.attention + work.experts + work.rest
        exposed = {**tokens, "ep": tokens["ep"] - min(tokens["ep"] / 6, forward)}
    if layout.overlap == "chunks":
        exposed = _under_chunks(shape, layout, job, work, tokens)
    elif layout.overlap == "pairs":
        exposed = _under_pairs(shape, layout, work, tokens)
    first = units / (3 * len(shape.order))  # of the first unit, which nothing hides
    fsdp = max(units - computed, 0.0) + min(first, units)
    return {**exposed, "fsdp": fsdp}, sum(tokens.values()) + units - sum(exposed.values()) - fsdp


def _passes(layout: Layout) -> tuple[bool, ...]:
    """Of a layer, whether it is the backward: forward, a recomputation, backward."""
    return (False, False, True) if layout.checkpointing else (False, True)


def _ways(shape: Shape, layout: Layout) -> tuple[list[float], list[float], list[float]]:
    """Of each chunk of heads, its share of the bytes of sp on its way in, and on its way out, and of the heads."""
    heads = shape.attention
    spans = head_layout(heads.heads, heads.key_value_heads, layout.sp)
    come, leave, own = [], [], []
    for part, fresh in chunk_layouts(spans) if layout.overlap == "chunks" else [(spans, spans.key_value)]:
        queries, keys = (sum(b - a for a, b in x) for x in (part.query, fresh))
        come.append(queries * heads.width + keys * (heads.width + heads.values))
        leave.append(queries * heads.values)
        own.append(queries / heads.heads)
    total = sum(come) + sum(leave)
    return [x / total for x in come], [x / total for x in leave], own


def _under_chunks(shape: Shape, layout: Layout, job: Job, work: _Work, tokens: dict[str, float]) -> dict[str, float]:
    """What chunks leave exposed."""
    passes, found = _passes(layout), dict(tokens)
    if tokens["sp"]:
        *ways, own = _ways(shape, layout)
        come, leave = ([x * tokens["sp"] / len(passes) for x in way] for way in ways)
        found["sp"] = bare_chunks(Chunked(come, leave, [x * work.attention for x in own], 2.5), passes)
    if tokens["ep"]:
        t = layout.tokens(job)
        own = [size / t for size in chunk_sizes(t, CHUNKS)]
        each = [x * tokens["ep"] / len(passes) / 2 for x in own]
        found["ep"] = bare_chunks(
            Chunked(each, each, [x * work.experts for x in own], 2), passes, layout.checkpointing
        )
    return found


def _under_pairs(shape: Shape, layout: Layout, work: _Work, tokens: dict[str, float]) -> dict[str, float]:
    """What pairs leave exposed. Of what is neither attention nor experts, a half is in front of the attention where
    there are experts, else nearly all is behind the exchanges of the layer before."""
    passes = _passes(layout)
    other = work.matmul + work.rest
    share = [x / len(passes) for x in (tokens["sp"], tokens["ep"] / 2)]
    (come,), (leave,), _ = _ways(shape, layout) if tokens["sp"] else ([0.0], [0.0], [0.0])
    segments = []
    if tokens["sp"] and tokens["ep"]:
        segments = [Segment(other / 2, 2, "sp", share[0] * come), Segment(work.attention, 2.5, "sp", share[0] * leave)]
        segments += [Segment(other / 2, 2, "ep", share[1]), Segment(work.experts, 2, "ep", share[1])]
    elif tokens["sp"]:
        segments = [Segment(other + work.experts, 2, "sp", share[0] * come)]
        segments += [Segment(work.attention, 2.5, "sp", share[0] * leave)]
    elif tokens["ep"]:
        segments = [Segment(other + work.attention, 2, "ep", share[1]), Segment(work.experts, 2, "ep", share[1])]
    experts = bool(tokens["ep"])
    front = 1.0 if experts else 1 - _behind_attention(shape)
    border = Border(len(shape.order), front, layout.checkpointing and not experts, layout.checkpointing and experts)
    return {**tokens, **bare_pairs(segments, passes, border)}


def _behind_attention(shape: Shape) -> float:
    """Share of a layer's matmuls that comes after its attention."""
    layers = [shape.kinds[kind] for kind in shape.order]
    behind = sum(x.width * (shape.attention.out + 3 * (x.inner * (x.top_k or 1) + x.shared)) for x in layers)
    return behind / sum(x.active for x in layers)


def _pairs(job: Job, window: int) -> float:
    """Pairs of a query and a key that it sees, in a full sequence of documents of equal length."""
    length = min(job.document, job.context)
    seen = length / 2 if not window or window >= length else window * (1 - window / (2 * length))
    return job.context * seen


def _trained(shape: Shape, layout: Layout, job: Job) -> float:
    """Trained parameters on a rank of a stage."""
    found = 0.0
    for layer in shape.layers:
        if job.lora:
            experts = layer.experts * layer.expert_adapter(job.lora)
            found += (sum(w.size for w in layer.adapters(job.lora)) + experts) / layout.fsdp
        else:
            experts = layer.experts * layer.expert
            found += (layer.total - experts) / layout.fsdp + experts / layout.ep / layout.efsdp
    outer = sum(w.size for w in (*shape.head, *shape.root))
    return found + (0 if job.lora else outer / layout.fsdp)
