"""Attention of packed documents on FlexAttention: softcap, sinks in fp32, and masks of which no limits can be read.

Every query sees the keys [low, high) of its row: documents, chunks, windows, padding, prefixes and groups of image
tokens are all of that form. So one mask function serves all, and which blocks of 128 x 128 scores are full, which are
partly masked and which are left out follows from the least and the greatest limits of 128 queries; nothing of the
size S x S is made for it.

    limits of 128 queries   low 0 .. 96, high 1 .. 128        key block 0    partly masked
                            low 100 .. 120, high 300 .. 420   key block 0    partly masked
                                                              key block 1    full
                                                              key blocks 2, 3    partly masked

FlexAttention is compiled for the device, and what a device can take (widths, shared memory) shows when it is compiled:
the first call of a kind runs 256 tokens forward and backward and compares them with the formula (`flex_works`).

Shapes: B rows; S tokens of a full row, P of one that is padded to complete blocks; H query heads; G key/value heads;
D, W widths of keys and of values. All are local to this rank and without collectives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from threading import Thread
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from hf_veomni.attention.blocks import Formula, attend
from hf_veomni.attention.mask import MaskSpec, Span

_BLOCK = 128
_LEAST_WIDTH = 16  # of its matrix products
# Entries of a mask that is evaluated to be read into limits, at a time: 128 MB.
_EVALUATED = 1 << 27
_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}  # of a trial, relative


class Limits(NamedTuple):
    """Keys that each query sees: [low, high) of its row, int64 [B, S]; queries outside of every span see themselves.

    Attributes:
        dead: bool [B, S], queries that see nothing by the mask; None if there are none.
    """

    low: Tensor
    high: Tensor
    dead: Tensor | None


def find_limits(spec: MaskSpec) -> Limits | None:
    """Limits of a mask; None if some query sees keys with a gap between them.

    Made once a forward. A mask that has to be evaluated is, block by block, and one small tensor is read back.
    """
    if "limits" not in spec.cache:
        spec.cache["limits"] = _evaluate_limits(spec) if spec.evaluate else _read_limits(spec)
    return spec.cache["limits"]


def _read_limits(spec: MaskSpec) -> Limits:
    """Limits from spans and windows, on the host and then copied."""
    own = torch.arange(spec.row_length)
    low, high = own.repeat(spec.num_rows, 1), (own + 1).repeat(spec.num_rows, 1)
    dead = torch.ones_like(low, dtype=torch.bool)
    for row, begin, end in spec.spans:
        span = own[begin:end]
        low[row, begin:end] = begin if spec.before is None else (span - spec.before).clamp(min=begin)
        high[row, begin:end] = end if spec.after is None else (span + spec.after + 1).clamp(max=end)
        dead[row, begin:end] = False
    low, high, gone = (x.to(spec.device, non_blocking=True) for x in (low, high, dead))
    return Limits(low, high, gone if bool(dead.any()) else None)


def _evaluate_limits(spec: MaskSpec) -> Limits | None:
    own = torch.arange(spec.row_length, device=spec.device)
    low, high = own.repeat(spec.num_rows, 1), (own + 1).repeat(spec.num_rows, 1)
    dead = torch.ones_like(low, dtype=torch.bool)
    sound = torch.ones((), dtype=torch.bool, device=spec.device)
    for row, begin, end in spec.spans:
        keys = Span(row, begin, end)
        size = max(1, _EVALUATED // (end - begin))
        for first in range(begin, end, size):
            last = min(first + size, end)
            seen = spec.block(Span(row, first, last), keys)
            count = seen.sum(-1)
            lowest = seen.byte().argmax(-1)
            highest = seen.shape[-1] - seen.flip(-1).byte().argmax(-1)
            some = count > 0
            sound = sound & ((highest - lowest == count) | ~some).all()
            part = slice(first, last)
            low[row, part] = torch.where(some, begin + lowest, low[row, part])
            high[row, part] = torch.where(some, begin + highest, high[row, part])
            dead[row, part] = ~some
    found, any_dead = torch.stack([sound, dead.any()]).tolist()
    return Limits(low, high, dead if any_dead else None) if found else None


def make_block_mask(limits: Limits) -> BlockMask:
    """The mask of rows that are padded to complete blocks, from limits of S tokens. Memory: 16 (P / 128)^2 B bytes."""
    rows, length = limits.low.shape
    blocks = max(2, -(-length // _BLOCK))  # one alone would be compiled for by itself
    own = torch.arange(length, blocks * _BLOCK, device=limits.low.device).expand(rows, -1)
    low, high = torch.cat([limits.low, own], 1), torch.cat([limits.high, own + 1], 1)
    lows, highs = low.view(rows, blocks, _BLOCK), high.view(rows, blocks, _BLOCK)
    begin = torch.arange(blocks, device=low.device) * _BLOCK
    end = begin + _BLOCK
    some = (lows.amin(-1)[..., None] < end) & (highs.amax(-1)[..., None] > begin)
    full = (lows.amax(-1)[..., None] <= begin) & (highs.amin(-1)[..., None] >= end)
    low, high = low.int(), high.int()

    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= low[row, query]) & (key < high[row, query])

    parts = (*_ordered(some & ~full), *_ordered(full))
    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=_BLOCK, mask_mod=mask)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [B, n, n] to how many key blocks each query block has, and which: [B, 1, n] and [B, 1, n, n], int32."""
    order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


@torch.compiler.disable  # of a compiled layer around it; what is compiled here stays so
def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: MaskSpec,
    formula: Formula,
    *,
    sinks: Tensor | None = None,
) -> Tensor:
    """[B, H, S, D], [B, G, S, D], [B, G, S, W] and sinks [H] to [B, S, H, W]; zeros for padding."""
    limits = find_limits(spec)
    assert limits is not None
    mask = spec.cache.get("flex")
    if mask is None:
        mask = spec.cache["flex"] = make_block_mask(limits)
    out = _run(query, key, value, mask, formula, sinks).transpose(1, 2)
    return out.contiguous() if limits.dead is None else out.masked_fill(limits.dead[..., None, None], 0)


def _run(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, formula: Formula, sinks: Tensor | None) -> Tensor:
    """[B, H, S, W]. Rows are padded to complete blocks, which keeps short ones off the kernel for decoding."""
    length, padded = query.shape[2], mask.shape[-2]
    query, key, value = (F.pad(x, (0, 0, 0, padded - length)).contiguous() for x in (query, key, value))
    shapes = (min(query.shape[0], 2), query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    grads = (torch.is_grad_enabled(), *(x.requires_grad for x in (query, key, value)))
    kind = (query.device, query.dtype, shapes, grads, torch.is_autocast_enabled(query.device.type), formula)
    out, aux = _compiled(kind)(
        query,
        key,
        value,
        score_mod=None if formula.softcap is None else _capped(formula.softcap),
        block_mask=mask,
        scale=formula.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is not None:
        total = torch.logaddexp(aux.lse, sinks.to(aux.lse.dtype)[:, None])
        out = (out * torch.exp(aux.lse - total)[..., None]).to(value.dtype)
    return out[:, :, :length]


@lru_cache(maxsize=8)
def _capped(softcap: float) -> Callable[..., Tensor]:
    def score(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score


@lru_cache(maxsize=64)
def _compiled(kind: object) -> Callable[..., Any]:
    """FlexAttention for inputs of one kind, compiled on its first call, and again for rows of any length.

    A kind is all that torch compiles anew for, but for lengths. Each has a code object of its own, since torch counts
    recompilations by it; beyond its limit (8) `fullgraph` makes it an error, where full scores would be computed.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return flex_attention(*args, **kwargs)

    return torch.compile(FunctionType(run.__code__.replace(), globals()), fullgraph=True)


def has_flex(device: torch.device) -> bool:
    """Triton compiles for Volta (compute capability 7.0) or newer."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (7, 0)


@torch.compiler.disable
def flex_applies(
    query: Tensor, key: Tensor, value: Tensor, spec: MaskSpec, formula: Formula, sinks: Tensor | None
) -> bool:
    """Whether FlexAttention can take these, which the first call of a kind tries; it has no dropout."""
    widths = (query.shape[-1], value.shape[-1])
    if not has_flex(query.device) or formula.dropout or not query.dtype == key.dtype == value.dtype:
        return False
    if query.dtype not in _ERROR or min(widths) < _LEAST_WIDTH or find_limits(spec) is None:
        return False
    heads = (query.shape[1], key.shape[1])
    kind = (query.device, query.dtype, min(query.shape[0], 2), heads, widths, formula, sinks is not None)
    return flex_works(*kind, torch.get_float32_matmul_precision())


@lru_cache(maxsize=64)
def flex_works(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    heads: tuple[int, int],
    widths: tuple[int, int],
    formula: Formula,
    with_sinks: bool,
    precision: str = "highest",
) -> bool:
    """Compile for these, and compare outputs and gradients of two documents of 256 tokens with the formula.

    Args:
        precision: of matrix products in fp32, as set for the process.

    In a thread of its own: hooks of activation checkpointing, autocast and grad mode of the caller are not in force.
    """
    errors: list[Any] = []

    def trial() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            errors.append(_largest_error(device, dtype, rows, heads, widths, formula, with_sinks))
        except Exception as error:  # whatever the compiler of this device says
            errors.append(error)

    thread = Thread(target=trial)
    thread.start()
    thread.join()
    if isinstance(errors[0], torch.OutOfMemoryError):
        raise errors[0]  # says nothing of the kind, and is not to be remembered
    if isinstance(errors[0], float) and errors[0] < _ERROR[dtype]:
        return True
    reason = f"a relative error of {errors[0]:.1e}" if isinstance(errors[0], float) else repr(errors[0])[:500]
    warnings.warn(
        f"FlexAttention does not run here for {heads} heads of widths {widths} in {dtype} ({reason}): attention with "
        "a softcap, with sinks outside of bf16 and fp16, or with a mask that has to be evaluated is computed block by "
        "block, which is exact, and slow for long rows.",
        stacklevel=3,
    )
    return False


def _largest_error(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    heads: tuple[int, int],
    widths: tuple[int, int],
    formula: Formula,
    with_sinks: bool,
) -> float:
    """Of output and gradients, relative to the formula in fp64."""
    length, generator = 2 * _BLOCK, torch.Generator().manual_seed(0)  # the global one is left alone
    (queries, pairs), (width, value_width) = heads, widths
    sizes = [(queries, width), (pairs, width), (pairs, value_width), (queries, value_width)]
    *made, weights = (torch.randn(rows, n, length, w, generator=generator) for n, w in sizes)
    made[0] /= formula.scaling * width**0.5  # scores of deviation 1, whose gradients are not all rounding
    *made, weights = (x.to(device, dtype) for x in (*made, weights))
    if with_sinks:
        made.append(torch.randn(queries, generator=generator).to(device, torch.promote_types(dtype, torch.float32)))
    first = length // 2 - 7  # tokens of the first document
    own = torch.arange(length, device=device)
    low = torch.where(own < first, 0, first).expand(rows, -1)
    limits = Limits(low, (own + 1).expand(rows, -1), None)
    seen = (own >= low[..., None]) & (own <= own[:, None])
    results = []
    for exact in (False, True):
        inputs = [(x.double() if exact else x).detach().requires_grad_() for x in made]
        query, key, value, *rest = inputs
        extra = rest[0] if rest else None
        if exact:
            out = attend(query, key, value, formula, sinks=extra, mask=seen[:, None])
        else:
            out = _run(query, key, value, make_block_mask(limits), formula, extra)
        results.append([out, *torch.autograd.grad(out, inputs, weights.to(out.dtype))])
    pairs = [(got.detach().double(), wanted.detach()) for got, wanted in zip(*results, strict=True)]
    return max(float((got - wanted).norm() / wanted.norm()) for got, wanted in pairs)
