"""What the device reaches at the shapes of real layers: what a plan's time is predicted from.

Matmuls of Llama-3-8B and of one of its ranks, attention over packed sequences (forward, and forward with backward),
experts by `grouped_mm`, and copies between the device and pinned memory of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._record import quantiles
from benchmarks._timing import timed
from benchmarks.on_gpu.part import NOTE, Part
from hf_veomni.attention.kernel import Packing, attend_packed

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
    part.case("matmul", matmuls, part, seconds=15)
    part.case("attention", attention, part, seconds=40)
    part.case("grouped_mm", grouped, part, seconds=15)
    part.case("host copies", host_copies, part, seconds=15)


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
    """Kernels for packed sequences, of equal documents so that sdpa can take them as a batch. Causal pairs count."""
    if not part.cuda:
        part.row(NOTE, "the kernels need a CUDA device")
        return
    for shape in ATTENTION:
        attention_of(part, *shape)


def attention_of(part: Part, tokens: int, document: int, heads: int, kv_heads: int, width: int) -> None:
    q = random(part, tokens, heads, width, grad=True)
    k, v = (random(part, tokens, kv_heads, width, grad=True) for _ in range(2))
    ends = torch.arange(0, tokens + 1, document, dtype=torch.int32, device=part.device)
    grad, wanted = torch.randn_like(q), None
    operations = 4 * heads * width * tokens * (document + 1) / 2
    for name, forward in attention_kernels(ends, document).items():

        def both(forward: Callable[..., Tensor] = forward) -> Any:
            out = forward(q, k, v)
            return out, *torch.autograd.grad(out, [q, k, v], grad)

        what = f"{tokens} of {document}, {heads}/{kv_heads} x {width}, {name}"
        try:
            found = [x.detach().float() for x in both()]
            seconds = [measure(part, f, 5) for f in (partial(forward, q, k, v), both)]
        except Exception as error:  # of a kernel that this torch, or this device, has not
            part.row(NOTE, f"{what}: {str(error)[:120]}")
            continue
        wanted = wanted or found
        off = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
        rates = [n * operations / s["p50"] / 1e12 for n, s in zip((1, 3.5), seconds, strict=True)]
        summary = f"{what}: {rates[0]:.4g} TFLOP/s, with backward {rates[1]:.4g}, {off:.0e} off the first"
        values = {"shape": (tokens, document, heads, kv_heads, width), "forward": seconds[0], "both": seconds[1]}
        part.row(NOTE, summary, kernel=name, tflops=rates, **values)


def attention_kernels(ends: Tensor, document: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """By name: queries [T, H, D], keys and values [T, K, D] -> [T, H, D]; causal."""

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_packed(q, k, v, Packing(ends, document, q.shape[-1] ** -0.5, (-1, 0)))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = [x.view(-1, document, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).reshape(q.shape)

    def by(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return dense(q, k, v)

        return run

    return {
        "varlen_attn": packed,
        "sdpa": dense,
        "sdpa flash": by(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": by(SDPBackend.CUDNN_ATTENTION),
        "cudnn ragged": lambda q, k, v: _CudnnRagged.apply(q, k, v, ends, document),
    }


class _CudnnRagged(torch.autograd.Function):
    """cuDNN's attention on packed sequences, which `varlen_attn` takes by itself in newer versions."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, ends, ends, longest, longest, True, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, ends)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse, seed, offset, ends = ctx.saved_tensors
        lengths = (ends, ends, ctx.longest, ctx.longest)
        found = torch.ops.aten._cudnn_attention_backward(
            grads[0], q, k, v, out, lse, seed, offset, None, *lengths, 0.0, True
        )
        return *found, None, None


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
