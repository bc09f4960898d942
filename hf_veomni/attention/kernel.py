"""torch's varlen kernel (FlashAttention) on packed tensors, and attention sinks on top of it.

A sink s is one more score for all queries of a head, without a value. From the kernel's output o and its
lse = log sum exp(scores):

    lse' = log(exp(lse) + exp(s))        o' = o * exp(lse - lse')        ds = -sum exp(s - lse') (dO . o')

and the gradients of queries, keys and values are those that the kernel's own backward makes of o' and lse' in place of
o and lse: it takes its weights as exp(score - lse'), and subtracts dO . o' from their gradients, as the softmax over
[scores, sink] does. It ignores a gradient of its lse, so nothing that comes behind it could put the sink in.

Shapes: T packed tokens; H query heads; G key/value heads, H a multiple of G; D head width, a multiple of 8. All are
local to this rank and without collectives.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

# Newer versions want to be told; the kernel of torch 2.11 takes fewer key/value heads as they are.
_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters

# Tokens whose products are held in fp32 at a time.
_SUMMED_TOKENS = 8192


class Packing(NamedTuple):
    """What the kernel wants to know beside its tensors.

    Attributes:
        cu_seqlens: int32 [number of documents + 1], on the device.
        max_length: tokens of the longest document.
        scaling: of the scores.
        window: tokens to the left and to the right that are seen, -1 for all; (-1, 0) is causal.
    """

    cu_seqlens: Tensor
    max_length: int
    scaling: float
    window: tuple[int, int]


def attend_packed(query: Tensor, key: Tensor, value: Tensor, packing: Packing, sinks: Tensor | None = None) -> Tensor:
    """Attention of packed documents in one call.

    Args:
        query: [T, H, D], bf16 or fp16; key and value [T, G, D].
        sinks: [H], or None.

    Returns:
        [T, H, D]. Backward: one call of the kernel's own.
    """
    if sinks is not None:
        return _Sinks.apply(query, key, value, sinks, packing)
    edges, length, scaling, window = packing
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _TAKES_GROUPS else {}
    out = varlen_attn(query, key, value, edges, edges, length, length, scale=scaling, window_size=window, **grouped)
    assert isinstance(out, Tensor)
    return out


def forward_kernel(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and lse [H, T] in fp32: the operator below `varlen_attn`, which alone has the backward with it.

    These arguments are the same in torch 2.11 to 2.15, and without a backend among them it is FlashAttention.
    """
    edges, length, scaling, window = packing
    out, lse, _ = torch.ops.torch_attn._varlen_attn(
        query, key, value, edges, edges, length, length, window == (-1, 0), scaling, list(window)
    )
    return out, lse


def backward_kernel(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, packing: Packing
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output; `out` and `lse` are those of the softmax."""
    edges, length, scaling, window = packing
    dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)  # state of a generator that nothing draws from
    options = (window == (-1, 0), dropout, scaling, list(window))
    return torch.ops.torch_attn._varlen_attn_backward(
        grad, query, key, value, out, lse, edges, edges, length, length, *options
    )


class _Sinks(torch.autograd.Function):
    """See the top of this file. Keeps what the kernel alone would keep: inputs, output and lse."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, packing: Packing) -> Tensor:
        out, lse = forward_kernel(query, key, value, packing)
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out.mul_(torch.exp(lse - total).t().unsqueeze(-1))  # in fp32, rounded once, without a copy
        ctx.save_for_backward(query, key, value, sinks, out, total)
        ctx.packing = packing
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, total = ctx.saved_tensors
        grad = grad.contiguous()
        grads = backward_kernel(grad, query, key, value, out, total, ctx.packing)
        return *grads, _sink_gradient(grad, out, sinks, total) if ctx.needs_input_grad[3] else None, None


def _sink_gradient(grad: Tensor, out: Tensor, sinks: Tensor, total: Tensor) -> Tensor:
    """[H]: the sink takes its weight off all values, so off the output in proportion."""
    weights = torch.exp(sinks.to(total.dtype)[:, None] - total).t()  # [T, H]
    sums = torch.zeros_like(weights[0])
    parts = (x.split(_SUMMED_TOKENS) for x in (grad, out, weights))
    for grad_part, out_part, weight in zip(*parts, strict=True):
        sums -= ((grad_part.to(total.dtype) * out_part).sum(-1) * weight).sum(0)
    return sums.to(sinks.dtype)
