"""How long a step takes, by formulas: what the device achieves, and what of the communication nothing hides.

    matmuls     2 FLOP a weight and token, three times (forward, two in the backward), four with checkpointing
    attention   4 A FLOP a pair of tokens that see each other; its backward is 2.5 forwards
    rest        norms, activations, rope, routing: bytes through the device's memory
    exchanges   of tokens (sp, ep): exposed, or in chunks what attention or experts do not hide. Of parameters and
                gradients (FSDP2): hidden behind the layer that computes meanwhile, exposed where they take longer

The constants of the rest were measured on an H100 (benchmarks/results/on_gpu_nvidia-h100-80gb-hbm3.json, phases of the
dense step and of the step with experts), of which the formulas then make the measured step times within 15 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_veomni.expert.forward import CHUNKS
from hf_veomni.planner.devices import Device
from hf_veomni.planner.layout import Job, Layout
from hf_veomni.planner.shape import Shape, expert_adapter, iterate_adapters
from hf_veomni.planner.traffic import exchanges
from hf_veomni.sequence.pipelined import MOST_CHUNKS

# Bytes through memory in forward and backward: for each token, layer and hidden unit; each pair and hidden unit; each
# unit of queries and keys that are normed. And for each byte of a trained parameter in the optimizer.
_REST, _PAIR, _NORMED, _OPTIMIZER = 360, 90, 135, 11
_MATMUL_SHARE, _LOSS_SHARE = 0.9, 0.6  # of the rate of large matmuls, in a layer and in the loss
_RECOMPUTED = 4 / 3


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step.

    Attributes:
        parts: "matmul", "attention", "rest", "loss", "optimizer", and "sp", "ep", "fsdp": exposed communication.
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
    """The time of a step, of which each rank does its share; routing of experts is balanced."""
    t, again = layout.tokens(job), 1 if layout.checkpointing else 0
    times = 2 if job.lora else 3  # frozen weights have no gradient
    rate = device.matmul_tflops * 1e12
    dense = shape.matmuls + 3 / 2 * sum(w.size for w in iterate_adapters(shape, job.lora))
    routed = shape.top_k * (shape.expert + 3 / 2 * expert_adapter(shape, job.lora))
    matmul = shape.layers * t * 2 * (times + again) * (dense / (rate * _MATMUL_SHARE))
    experts = shape.layers * t * 2 * (times + again) * routed / (device.grouped_tflops * 1e12)
    forward = 4 * shape.queries * sum(_pairs(job, window) for window in shape.windows) / layout.sp
    speed = device.whole_tflops if job.document >= job.context else device.attention_tflops
    attention = forward * (3.5 + again) / (speed * 1e12)
    width = _REST * shape.width + _PAIR * shape.top_k * shape.width
    width += _NORMED * (shape.queries + shape.keys) if shape.normed else 0
    rest = shape.layers * t * width * (_RECOMPUTED if again else 1) / (device.memory_gbs * 1e9)
    head = 2 * t * shape.embedding
    loss = times * head / (rate * _LOSS_SHARE)
    layers = matmul + experts + attention + rest
    exposed, units = {"sp": 0.0, "ep": 0.0}, 0.0
    under = {"sp": (attention, min(MOST_CHUNKS, shape.heads // layout.sp)), "ep": (experts, 2 * CHUNKS - 2)}
    for exchange in exchanges(shape, layout, job):
        seconds = exchange.seconds(device)
        if exchange.axis in exposed:
            exposed[exchange.axis] += _bare(seconds, *under[exchange.axis]) if layout.overlap == "chunks" else seconds
        else:
            units += seconds
    first = units / (3 * shape.layers)  # of the first unit, which nothing hides
    exposed["fsdp"] = max(units - layers, 0.0) + min(first, units)
    steps = layout.accumulation(job)
    parts = {"matmul": matmul + experts, "attention": attention, "rest": rest, "loss": loss, **exposed}
    parts = {name: steps * value for name, value in parts.items()}
    parts["optimizer"] = (
        _OPTIMIZER * (2 if job.mixed else 1) * _trained(shape, layout, job) / (device.memory_gbs * 1e9)
    )
    flops = steps * (times * (shape.layers * 2 * t * (dense + routed) + forward + head))
    return Time(parts, steps * (units - exposed["fsdp"]), flops)


def _pairs(job: Job, window: int) -> float:
    """Pairs of a query and a key that it sees, in a full sequence of documents of equal length."""
    length = min(job.document, job.context)
    seen = length / 2 if not window or window >= length else window * (1 - window / (2 * length))
    return job.context * seen


def _bare(seconds: float, compute: float, chunks: int) -> float:
    """What chunks leave of an exchange: the first one in and the last one out, or what `compute` does not cover."""
    return max(seconds / max(chunks, 1), seconds - compute)


def _trained(shape: Shape, layout: Layout, job: Job) -> float:
    if job.lora:
        experts = shape.experts * expert_adapter(shape, job.lora)
        return shape.layers * (sum(w.size for w in iterate_adapters(shape, job.lora)) + experts) / layout.fsdp
    experts = shape.layers * shape.experts * shape.expert
    return (shape.total - experts) / layout.fsdp + experts / layout.ep / layout.efsdp
