"""Attention in blocks of queries, each over the keys of its own span: the plan, the slices and the explicit formula.

    span of 10 tokens, before=3, after=0, blocks of 4        queries 0-3   keys 0-3
                                                             queries 4-7   keys 1-7
                                                             queries 8-9   keys 5-9

Two ways to keep the memory of a long document in bounds: `take_slices` cuts all blocks out at once and leaves each to
a fused kernel; `attend_recomputed` keeps nothing of a block but its output and computes it again in the backward.

Shapes: B rows; S tokens of a full row; H query heads; G key/value heads; D, W widths of keys and of values; m queries
and n keys of one block. All are local to this rank and without collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_veomni.attention.mask import MaskSpec, Span

# Scores of one block, over all heads, that the explicit formula holds at a time: 8 MB in fp32, 128 MB on a GPU.
_BLOCK_SCORES = {"cpu": 1 << 21, "cuda": 1 << 25}


class Block(NamedTuple):
    """Queries of one row and the keys that they may see, each [begin, end) in tokens of the row."""

    queries: Span
    keys: Span
    plain: bool  # a full span, fully causal or fully bidirectional


class Formula(NamedTuple):
    """What is done to scores = q @ k^T: scaled, capped to softcap * tanh(scores / softcap), dropped out."""

    scaling: float
    softcap: float | None = None
    dropout: float = 0.0


def plan_blocks(spec: MaskSpec, size: int, *, split_plain: bool) -> tuple[Block, ...]:
    """Blocks of at most `size` queries; spans that need no mask stay in one piece unless `split_plain`."""
    blocks = []
    for span in spec.spans:
        row, begin, end = span
        if not split_plain and spec.is_plain(end - begin):
            blocks.append(Block(span, span, True))
            continue
        for first in range(begin, end, size):
            last = min(first + size, end)
            low = begin if spec.before is None else max(begin, first - spec.before)
            high = end if spec.after is None else min(end, last + spec.after)
            blocks.append(Block(Span(row, first, last), Span(row, low, high), False))
    return tuple(blocks)


class _Slices(torch.autograd.Function):
    """Many slices of one tensor. Its backward adds into one buffer, where one `narrow` each would fill S for each."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, spans: Sequence[Span], overlap: bool) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.spans, ctx.overlap = tensor.shape, spans, overlap
        return tuple(tensor[row : row + 1, :, begin:end] for row, begin, end in spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return None, None, None
        # Sums of several blocks are rounded once, not once a block.
        wide = torch.promote_types(given.dtype, torch.float32) if ctx.overlap else given.dtype
        total = torch.zeros(ctx.shape, dtype=wide, device=given.device)
        for (row, begin, end), grad in zip(ctx.spans, grads, strict=True):
            if grad is not None:
                total[row : row + 1, :, begin:end] += grad
        return total.to(given.dtype), None, None


def take_slices(tensor: Tensor, spans: Sequence[Span], *, overlap: bool) -> tuple[Tensor, ...]:
    """[B, H, S, D] to one [1, H, n, D] for each (row, begin, end). Backward: the sum of what overlaps."""
    return _Slices.apply(tensor, spans, overlap)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    formula: Formula,
    *,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """The attention formula step by step, scores in fp32 at least: softmax over [scores, sink], the sink dropped.

    Args:
        query, key, value: [B, H, m, D], [B, G, n, D], [B, G, n, W].
        sinks: [H], one more score for every query, without a value (gpt-oss).
        bias: added to the scores, [B or 1, H or 1, m, n].
        mask: bool, [m, n] or [B, 1, m, n]; a query without any key gets zeros, and so do its gradients.
        seed: of the dropout.

    Returns:
        [B, H, m, W].
    """
    (rows, heads, m, width), (num_kv, n) = query.shape, key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.reshape(rows, num_kv, heads // num_kv * m, width) @ key.transpose(-1, -2)
    scores = scores.view(rows, heads, m, n).to(dtype) * formula.scaling
    if formula.softcap is not None:
        scores = torch.tanh(scores / formula.softcap) * formula.softcap
    if bias is not None:
        scores = scores + bias
    alive = None
    if mask is not None:
        alive = mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~mask & alive, -torch.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks.to(dtype).view(1, -1, 1, 1))
        weights = torch.exp(scores - total)
    if formula.dropout:
        generator = torch.Generator(scores.device).manual_seed(seed)
        kept = torch.rand(weights.shape, device=scores.device, generator=generator) >= formula.dropout
        weights = weights * kept / max(1 - formula.dropout, torch.finfo(dtype).tiny)
    out = weights.to(value.dtype).view(rows, num_kv, -1, n) @ value
    out = out.view(rows, heads, m, value.shape[-1])
    return out if alive is None else out.masked_fill(~alive, 0)


class _Recomputed(torch.autograd.Function):
    """`attend` over blocks. The backward runs every block again, so no scores are kept in between."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        spec: MaskSpec,
        blocks: Sequence[Block],
        formula: Formula,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks, bias)
        ctx.spec, ctx.blocks, ctx.formula = spec, blocks, formula
        # One draw from the generator that activation checkpointing restores, then a seed for each block.
        ctx.seed = int(torch.randint(1 << 62, ())) if formula.dropout else 0
        rows, heads, length, _ = query.shape
        out = query.new_zeros(rows, length, heads, value.shape[-1])
        for index, block in enumerate(blocks):
            parts = _cut(block, query, key, value, sinks, bias)
            row, begin, end = block.queries
            out[row, begin:end] = _run(ctx, index, parts)[0].transpose(0, 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs: Sequence[Any] = ctx.saved_tensors
        totals = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            if x is not None and needed
            else None
            for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        for index, block in enumerate(ctx.blocks):
            row, begin, end = block.queries
            parts: list[Any] = [x if x is None else x.detach() for x in _cut(block, *inputs)]
            sums = [(i, total) for i, total in enumerate(_cut(block, *totals)) if total is not None]
            with torch.enable_grad():
                leaves = [parts[i].requires_grad_() for i, _ in sums]
                out = _run(ctx, index, parts)
            given = grad[row, begin:end].transpose(0, 1)[None]
            for (_, total), got in zip(sums, torch.autograd.grad(out, leaves, given), strict=True):
                total += got
        grads = (x if x is None else x.to(given.dtype) for x, given in zip(totals, inputs, strict=True))
        return *grads, None, None, None


def _cut(block: Block, query: Any, key: Any, value: Any, sinks: Any, bias: Any) -> list[Any]:
    """A block's views of the five inputs, or of buffers in their shapes; None stays None."""
    row, first, last = block.queries
    _, low, high = block.keys
    if bias is not None:
        bias = bias[row : row + 1] if bias.shape[0] > 1 else bias
        bias = bias[:, :, first:last, low:high]
    cut = [(query, first, last), (key, low, high), (value, low, high)]
    return [*(x if x is None else x[row : row + 1, :, begin:end] for x, begin, end in cut), sinks, bias]


def _run(ctx: Any, index: int, parts: Sequence[Any]) -> Tensor:
    """`attend` on the parts of one block."""
    block, spec, formula = ctx.blocks[index], ctx.spec, ctx.formula
    query, key, value, sinks, bias = parts
    limited = spec.evaluate or spec.before is not None or spec.after is not None
    mask = spec.block(block.queries, block.keys).to(query.device) if limited else None
    return attend(query, key, value, formula, sinks=sinks, bias=bias, mask=mask, seed=ctx.seed + index)


def attend_recomputed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: MaskSpec,
    formula: Formula,
    *,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention with anything that a fused kernel has no argument for.

    Args:
        query, key, value: [B, H, S, D], [B, G, S, D], [B, G, S, W].
        sinks: [H]; bias: [B or 1, H or 1, S, S], as the model made it.

    Returns:
        [B, S, H, W]; zeros for padding. Backward: once more the forward of each block, then its gradients.
    """
    if bias is not None and bias.shape[-2:] != (spec.row_length, spec.row_length):
        bias = bias.expand(-1, -1, spec.row_length, spec.row_length)
    heads = query.shape[1]
    blocks = spec.cache.get(heads)
    if blocks is None:
        width = spec.max_length
        if spec.before is not None and spec.after is not None:
            width = min(width, spec.before + spec.after + 128)
        size = min(512, max(16, _BLOCK_SCORES.get(query.device.type, 1 << 21) // (heads * width)))
        blocks = spec.cache[heads] = plan_blocks(spec, size, split_plain=True)
    return _Recomputed.apply(query, key, value, sinks, bias, spec, blocks, formula)
