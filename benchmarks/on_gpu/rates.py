"""What the device reaches at the shapes of real layers: what a plan's time is predicted from.

Matmuls of Llama-3-8B and of one of its ranks, attention over packed rows (forward, and forward with backward), experts
by `grouped_mm`, and copies between the device and pinned memory of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from benchmarks._record import quantiles
from benchmarks._timing import timed
from benchmarks.on_gpu.part import NOTE, Part

# rows, columns in, columns out: of 8K tokens in Llama-3-8B, of 1K and 256 tokens, and of narrow models
MATMULS = (
    (8192, 4096, 14_336),
    (8192, 14_336, 4096),
    (8192, 4096, 6144),
    (8192, 2048, 2048),
    (8192, 1024, 3072),
    (1024, 4096, 14_336),
    (256, 4096, 14_336),
    (1024, 4096, 128_256),
)
# tokens, tokens of each document, heads, heads of keys, head width
ATTENTION = (
    (8192, 8192, 32, 8, 128),
    (32_768, 32_768, 32, 8, 128),
    (65_536, 65_536, 32, 8, 128),
    (65_536, 65_536, 8, 2, 128),
    (32_768, 1024, 32, 8, 128),
    (8192, 8192, 16, 8, 64),
)
# tokens, experts, columns in, columns out: what experts of Qwen3-30B-A3B get from 8K tokens, over 1 and 8 ranks
GROUPED = ((65_536, 128, 2048, 768), (65_536, 16, 2048, 1536), (8192, 16, 2048, 1536))


def run(part: Part) -> None:
    part.case("matmul", matmuls, part)
    part.case("attention", attention, part)
    part.case("grouped_mm", grouped, part)
    part.case("host copies", host_copies, part)


def measure(part: Part, function: Callable[[], Any], repeat: int = 10) -> dict[str, float]:
    """Quantiles of seconds."""
    at = torch.device(part.device)
    for _ in range(2):
        function()
    return quantiles([timed(function, at) for _ in range(2 if part.small else repeat)])


def report(part: Part, name: str, operations: float, seconds: dict[str, float], **values: Any) -> None:
    rate = operations / seconds["p50"] / 1e12
    part.row(
        NOTE, f"{name}: {rate:.4g} TFLOP/s, {1000 * seconds['p50']:.3g} ms", tflops=rate, seconds=seconds, **values
    )


def shrunk(part: Part, shapes: tuple[tuple[int, ...], ...]) -> Iterator[tuple[int, ...]]:
    """The shapes; on a CPU two of them, a hundredth as large."""
    for shape in shapes[:2] if part.small else shapes:
        yield tuple(max(8, size // 128) for size in shape) if part.small else shape


def random(part: Part, *shape: int, grad: bool = False) -> Tensor:
    dtype = torch.bfloat16 if part.cuda else torch.float32
    return torch.randn(*shape, device=part.device, dtype=dtype).requires_grad_(grad)


def matmuls(part: Part) -> None:
    for rows, inner, columns in shrunk(part, MATMULS):
        a, b = random(part, rows, inner), random(part, columns, inner)
        seconds = measure(part, lambda a=a, b=b: F.linear(a, b))
        report(
            part, f"[{rows}, {inner}] x {columns}", 2 * rows * inner * columns, seconds, shape=(rows, inner, columns)
        )


def attention(part: Part) -> None:
    """The kernel of packed rows. Pairs of a causal document count, as in a model's FLOPs."""
    if not part.cuda:
        part.row(NOTE, "the kernel needs a CUDA device")
        return
    for tokens, document, heads, kv_heads, width in ATTENTION:
        q = random(part, tokens, heads, width, grad=True)
        # The kernel of torch 2.11 takes no groups: keys are repeated before it, outside of what is timed.
        k, v = (random(part, tokens, heads, width, grad=True) for _ in range(2))
        ends = torch.arange(0, tokens + 1, document, dtype=torch.int32, device=part.device)

        def forward(q=q, k=k, v=v, ends=ends, document=document) -> Tensor:
            return varlen_attn(q, k, v, ends, ends, document, document, window_size=(-1, 0))

        def both(q=q, k=k, v=v, forward=forward) -> Any:
            out = forward()
            return torch.autograd.grad(out, [q, k, v], torch.ones_like(out))

        pairs = (tokens // document) * document * (document + 1) / 2
        name, shape = f"{tokens} tokens of {document}, {heads} x {width}", (tokens, document, heads, kv_heads, width)
        one = 4 * heads * width * pairs
        report(part, f"{name}, forward", one, measure(part, forward, 5), shape=shape)
        report(part, f"{name}, forward and backward", 3.5 * one, measure(part, both, 5), shape=shape)


def grouped(part: Part) -> None:
    for tokens, experts, inner, columns in shrunk(part, GROUPED):
        x, weight = random(part, tokens, inner), random(part, experts, inner, columns)
        ends = torch.linspace(0, tokens, experts + 1, device=part.device)[1:].round().int()
        seconds = measure(part, lambda x=x, weight=weight, ends=ends: F.grouped_mm(x, weight, offs=ends))
        shape = (tokens, experts, inner, columns)
        report(
            part, f"{tokens} over {experts} of {inner} x {columns}", 2 * tokens * inner * columns, seconds, shape=shape
        )


def host_copies(part: Part) -> None:
    """To pinned memory and back: what an offloaded state, or a copy of it for a checkpoint, costs."""
    size = 2**20 if part.small else 2**30
    there = torch.ones(size, dtype=torch.uint8, device=part.device)
    here = torch.ones(size, dtype=torch.uint8, pin_memory=part.cuda)
    for name, function in (("to the host", lambda: here.copy_(there)), ("to the device", lambda: there.copy_(here))):
        seconds = measure(part, function, 5)
        part.row(NOTE, f"{name}: {size / seconds['p50'] / 1e9:.3g} GB/s", gb_per_second=size / seconds["p50"] / 1e9)
