"""Ulysses: exchange sequence shards for head shards around any attention function (arXiv 2309.14509).

    rank r before   all H heads, its s = S/sp tokens        q, k, v [B, H, s, D]
    all-to-all      h of H heads, all S tokens              q, k, v [B, h, S, D]
    attention       any function, with the mask of the full row
    all-to-all      all H heads, its s tokens               out     [B, s, H, D]

Query heads are assigned as evenly as the head count allows (9 heads over 2 ranks: 5 and 4). A rank gets the key/value
heads that its query heads read, so fewer key/value heads than ranks are replicated, and nothing else is sent.

Shapes: B rows; S, s tokens of the full row and of this rank; H, h query heads; K, k key/value heads; D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.comm.all_to_all import Flight, all_to_all, give_way, land, launch
from hf_veomni.errors import UnsupportedError

Span = tuple[int, int]

EXCHANGED = "_omni_exchanged"  # on an attention module: what runs in place of `ulysses_attention`


@dataclass(frozen=True)
class HeadLayout:
    """Which heads each rank of an SP group attends with: pure index arithmetic.

    Attributes:
        query: per rank the half-open span of its query heads.
        key_value: per rank the span of the key/value heads that those read; spans may overlap.
    """

    query: tuple[Span, ...]
    key_value: tuple[Span, ...]
    group: int

    def counts(self, rank: int) -> list[int]:
        """How many query heads of `rank` read each of its local key/value heads, in order."""
        (first, last), (low, high) = self.query[rank], self.key_value[rank]
        return [min(last, (h + 1) * self.group) - max(first, h * self.group) for h in range(low, high)]


@lru_cache(maxsize=64)
def head_layout(num_query: int, num_key_value: int, sp_size: int) -> HeadLayout:
    """Assign `num_query` heads to `sp_size` ranks, neighbours together, sizes differing by at most one.

    Raises:
        UnsupportedError: more ranks than query heads, or query heads that are no multiple of the key/value heads.
    """
    if sp_size > num_query:
        raise UnsupportedError(
            f"`sp_size` ({sp_size}) must not exceed the number of query heads ({num_query}): use at most {num_query}."
        )
    if num_query % num_key_value:
        raise UnsupportedError(
            f"The number of query heads ({num_query}) must be a multiple of the key/value heads ({num_key_value})."
        )
    group = num_query // num_key_value
    small, larger = divmod(num_query, sp_size)
    edges = [rank * small + min(rank, larger) for rank in range(sp_size + 1)]
    query = tuple(zip(edges[:-1], edges[1:], strict=True))
    key_value = tuple((first // group, (last - 1) // group + 1) for first, last in query)
    return HeadLayout(query, key_value, group)


class _PackHeads(torch.autograd.Function):
    """Several [B, *, s, D] tensors as the blocks [sum, B, s, D] that one all-to-all sends, in rank order.

    Spans may overlap: the gradient of a head that several ranks read is the sum of theirs, added in rank order.
    """

    @staticmethod
    def forward(ctx: Any, spans: tuple[tuple[Span, ...], ...], *tensors: Tensor) -> Tensor:
        ctx.spans, ctx.shapes = spans, [t.shape for t in tensors]
        return torch.cat([tensor[:, low:high].transpose(0, 1) for tensor, (low, high) in _blocks(spans, tensors)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out = [grads[0].new_zeros(shape) for shape in ctx.shapes]
        spans = list(_blocks(ctx.spans, out))
        blocks = grads[0].split([high - low for _, (low, high) in spans])
        for block, (tensor, (low, high)) in zip(blocks, spans, strict=True):
            tensor[:, low:high] += block.transpose(0, 1)
        return None, *out


def _blocks(spans: tuple[tuple[Span, ...], ...], tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Span]]:
    """Each tensor with the span of its heads that a rank gets, rank by rank."""
    return ((tensor, span[peer]) for peer in range(len(spans[0])) for tensor, span in zip(tensors, spans, strict=True))


def _launch_heads(
    group: dist.ProcessGroup, rank: int, spans: tuple[tuple[Span, ...], ...], *tensors: Tensor
) -> Flight:
    send = [sum(span[peer][1] - span[peer][0] for span in spans) for peer in range(len(spans[0]))]
    return launch(_PackHeads.apply(spans, *tensors), group, send, [send[rank]] * len(send))


def _land_heads(flight: Flight, rank: int, spans: tuple[tuple[Span, ...], ...]) -> list[Tensor]:
    """Local [B, n, S, D] tensors, n heads of this rank each."""
    received = land(flight).unflatten(0, (len(spans[0]), -1))  # [sp, n, B, s, D]
    counts = [span[rank][1] - span[rank][0] for span in spans]
    return [part.flatten(2, 3) for part in received.permute(2, 1, 0, 3, 4).split(counts, dim=1)]


def _repeat_heads(x: Tensor, counts: list[int]) -> Tensor:
    """[B, k, S, D] to [B, sum(counts), S, D]: head i `counts[i]` times (expand, so the backward is a plain sum)."""
    return torch.cat([x[:, i : i + 1].expand(-1, n, -1, -1) for i, n in enumerate(counts)], dim=1)


def sequence_to_heads(
    query: Tensor, key: Tensor, value: Tensor, layout: HeadLayout, group: dist.ProcessGroup, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Local query [B, H, s, D], key and value [B, K, s, D] to [B, h, S, D] and [B, k, S, D].

    Collective: one all-to-all over `group` (two if the value width differs, as in MLA); the backward is the reverse
    one. The gradients of a key/value head that several ranks read are then added up, in rank order.
    """
    joint = [(query, key, value)] if value.shape[-1] == query.shape[-1] else [(query, key), (value,)]
    every = iter((layout.query, layout.key_value, layout.key_value))
    spans = [tuple(next(every) for _ in tensors) for tensors in joint]
    flights = [_launch_heads(group, rank, s, *tensors) for s, tensors in zip(spans, joint, strict=True)]
    give_way()
    landed = [_land_heads(flight, rank, s) for flight, s in zip(flights, spans, strict=True)]
    query, key, value = (tensor for tensors in landed for tensor in tensors)
    return query, key, value


def heads_to_sequence(out: Tensor, layout: HeadLayout, group: dist.ProcessGroup, rank: int) -> Tensor:
    """Attention output [B, S, h, D] of this rank's heads to [B, s, H, D] of this rank's tokens.

    Collective: one all-to-all over `group`; the backward is the reverse one.
    """
    size = len(layout.query)
    heads = [last - first for first, last in layout.query]
    send = out.unflatten(1, (size, -1)).permute(1, 3, 0, 2, 4).flatten(0, 1)  # [sp * h, B, s, D]
    received = all_to_all(send, group, [heads[rank]] * size, heads)  # [H, B, s, D]
    return received.permute(1, 2, 0, 3).contiguous()


class ModuleView:
    """What an attention function sees as `module`: the real one, but for some attributes (heads of this rank)."""

    def __init__(self, module: torch.nn.Module | ModuleView, **overrides: Any) -> None:
        self.__dict__.update(_module=module, **overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def _slice_per_head(x: Any, dim: int, span: Span, num_heads: int) -> Any:
    """This rank's heads of a tensor that has one entry per query head; anything else unchanged."""
    if isinstance(x, Tensor) and x.dim() > dim and x.shape[dim] == num_heads:
        return x.narrow(dim, span[0], span[1] - span[0])
    return x


def attend_heads(
    inner: Callable[..., tuple[Tensor, Any]],
    module: torch.nn.Module | ModuleView,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    layout: HeadLayout,
    rank: int,
    num_heads: int,
    kwargs: dict[str, Any],
) -> Tensor:
    """`inner` on this rank's heads [B, h, S, D] as `layout` has them, of `num_heads`; [B, S, h, D]. No collective."""
    span, counts = layout.query[rank], layout.counts(rank)
    if len(set(counts)) > 1:  # attention functions repeat every key/value head equally often
        key, value, counts = _repeat_heads(key, counts), _repeat_heads(value, counts), [1]
    overrides: dict[str, Any] = {"num_key_value_groups": counts[0]}
    if isinstance(getattr(module, "sinks", None), Tensor):
        overrides["sinks"] = _slice_per_head(module.sinks, 0, span, num_heads)
    kwargs = dict(kwargs)
    for name, dim in (("s_aux", 0), ("position_bias", 1)):
        if kwargs.get(name) is None:
            kwargs.pop(name, None)
        else:
            kwargs[name] = _slice_per_head(kwargs[name], dim, span, num_heads)
    mask = attention_mask
    if isinstance(mask, Tensor) and mask.dim() == 4:
        mask = _slice_per_head(mask, 1, span, num_heads)
    return inner(ModuleView(module, **overrides), query, key, value, mask, **kwargs)[0]


def ulysses_attention(
    inner: Callable[..., tuple[Tensor, Any]],
    module: torch.nn.Module | ModuleView,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    group: dist.ProcessGroup,
    rank: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run `inner`, any Hugging Face attention function, on this rank's heads of the full rows.

    Args:
        query: local [B, H, s, D]; key and value local [B, K, s, D].
        attention_mask: whatever `inner` takes for the FULL row; sliced here if it has an entry per head.

    Returns:
        Local output [B, s, H, D], and None: attention weights would be those of this rank's heads only.

    Collectives: two all-to-alls over `group` (three if the value width differs), and as many in the backward.
    """
    num_heads = query.shape[1]
    layout = head_layout(num_heads, key.shape[1], dist.get_world_size(group))
    query, key, value = sequence_to_heads(query, key, value, layout, group, rank)
    out = attend_heads(inner, module, query, key, value, attention_mask, layout, rank, num_heads, kwargs)
    return heads_to_sequence(out, layout, group, rank), None
