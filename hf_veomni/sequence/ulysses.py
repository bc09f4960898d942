"""Ulysses: exchange sequence shards for head shards around any attention function (arXiv 2309.14509).

    rank r before   all H heads, its s = S/sp tokens        q, k, v [B, H, s, D]
    all-to-all      h of H heads, all S tokens              q, k, v [B, h, S, D]
    attention       any function, with the mask of the full row
    all-to-all      all H heads, its s tokens               out     [B, s, H, D]

Query heads are assigned as evenly as the head count allows (9 heads over 2 ranks: 5 and 4). A rank gets the key/value
heads that its query heads read, so fewer key/value heads than ranks are replicated, and nothing else is sent.

Shapes: B rows; S, s tokens of the full row and of this rank; H, h query heads; G, g key/value heads; D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.comm.all_to_all import all_to_all, all_to_all_of_each
from hf_veomni.errors import UnsupportedError

Span = tuple[int, int]
Spans = tuple[Span, ...]  # of heads, one for each rank
Parts = tuple[tuple[int, Spans], ...]  # of one exchange: which tensors, and which of their heads go to each rank
Inner = Callable[..., tuple[Tensor, Any]]  # an attention function of transformers' `AttentionInterface`

EXCHANGED = "_omni_exchanged"  # on an attention module: what runs in place of `ulysses_attention`


@dataclass(frozen=True)
class HeadLayout:
    """Which heads each rank of an SP group attends with: pure index arithmetic.

    Attributes:
        query: per rank the half-open span of its query heads.
        key_value: per rank the span of the key/value heads that those read; spans may overlap.
    """

    query: Spans
    key_value: Spans
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


class PackHeads(torch.autograd.Function):
    """[B, *, s, D] tensors as what each exchange sends, [heads, B, s, D] in rank order; all in one node.

    Spans may overlap: the gradient of a head that several ranks read is the sum of theirs, added in rank order. In one
    node gradients are added into one tensor each, where a node for each exchange would give zeros for all others.
    """

    @staticmethod
    def forward(ctx: Any, exchanges: tuple[Parts, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchanges, ctx.shapes = exchanges, [t.shape for t in tensors]
        return tuple(
            torch.cat([tensors[index][:, low:high].transpose(0, 1) for index, (low, high) in _blocks(parts)])
            for parts in exchanges
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out = [grads[0].new_zeros(shape) for shape in ctx.shapes]
        for parts, grad in zip(ctx.exchanges, grads, strict=True):
            spans = _blocks(parts)
            for block, (index, (low, high)) in zip(grad.split([b - a for _, (a, b) in spans]), spans, strict=True):
                out[index][:, low:high] += block.transpose(0, 1)
        return None, *out


def _blocks(parts: Parts) -> list[tuple[int, Span]]:
    """(tensor, heads of it) that one exchange sends, rank by rank."""
    return [(index, spans[peer]) for peer in range(len(parts[0][1])) for index, spans in parts]


def join_exchanges(query: Spans, key_value: Spans, widths: tuple[int, int]) -> tuple[Parts, ...]:
    """What q, k and v (0, 1, 2) take: one exchange, or one more for values of another of the `widths` of k and v."""
    spans = (query, key_value, key_value)
    joint = ((0, 1, 2),) if widths[0] == widths[1] else ((0, 1), (2,))
    return tuple(tuple((index, spans[index]) for index in parts) for parts in joint)


def split_sizes(parts: Parts, rank: int) -> tuple[list[int], list[int]]:
    """Heads that this rank sends to each, and gets from each."""
    send = [sum(spans[peer][1] - spans[peer][0] for _, spans in parts) for peer in range(len(parts[0][1]))]
    return send, [send[rank]] * len(send)


def unpack_heads(received: Tensor, parts: Parts, rank: int) -> list[Tensor]:
    """[heads, B, s, D] in rank order to local [B, n, S, D] tensors, n heads of this rank each."""
    received = received.unflatten(0, (len(parts[0][1]), -1))  # [sp, heads, B, s, D]
    counts = [spans[rank][1] - spans[rank][0] for _, spans in parts]
    return [part.flatten(2, 3) for part in received.permute(2, 1, 0, 3, 4).split(counts, dim=1)]


def _repeat_heads(x: Tensor, counts: list[int]) -> Tensor:
    """[B, g, S, D] to [B, sum(counts), S, D]: head i `counts[i]` times (expand, so the backward is a plain sum)."""
    return torch.cat([x[:, i : i + 1].expand(-1, n, -1, -1) for i, n in enumerate(counts)], dim=1)


def sequence_to_heads(
    query: Tensor, key: Tensor, value: Tensor, layout: HeadLayout, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Local query [B, H, s, D], key and value [B, G, s, D] to [B, h, S, D] and [B, g, S, D].

    Collective: one all-to-all over `group` (two if the value width differs, as in MLA); the backward is the reverse
    one. The gradients of a key/value head that several ranks read are then added up, in rank order.
    """
    rank = dist.get_rank(group)
    exchanges = join_exchanges(layout.query, layout.key_value, (key.shape[-1], value.shape[-1]))
    sizes = [split_sizes(parts, rank) for parts in exchanges]
    landed = all_to_all_of_each(PackHeads.apply(exchanges, query, key, value), group, sizes)
    heads = (unpack_heads(received, parts, rank) for received, parts in zip(landed, exchanges, strict=True))
    query, key, value = chain.from_iterable(heads)
    return query, key, value


def pack_output(out: Tensor, layout: HeadLayout, rank: int) -> tuple[Tensor, list[int], list[int]]:
    """Attention output [B, S, h, D] as what is sent, [sp * h, B, s, D], and heads for each rank and of each rank."""
    heads = [last - first for first, last in layout.query]
    send = out.unflatten(1, (len(heads), -1)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return send, [heads[rank]] * len(heads), heads


def heads_to_sequence(out: Tensor, layout: HeadLayout, group: dist.ProcessGroup) -> Tensor:
    """Attention output [B, S, h, D] of this rank's heads to [B, s, H, D] of this rank's tokens.

    Collective: one all-to-all over `group`; the backward is the reverse one.
    """
    packed, send, receive = pack_output(out, layout, dist.get_rank(group))
    received = all_to_all(packed, group, send, receive)  # [H, B, s, D]
    return received.permute(1, 2, 0, 3).contiguous()


class ModuleView:
    """What an attention function sees as `module`: the real one, but for some attributes (heads of this rank)."""

    def __init__(self, module: torch.nn.Module | ModuleView, **overrides: object) -> None:
        self.__dict__.update(_module=module, **overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def _slice_per_head(x: object, dim: int, span: Span, num_heads: int) -> Any:
    """This rank's heads of a tensor that has one entry per query head; anything else unchanged."""
    if isinstance(x, Tensor) and x.dim() > dim and x.shape[dim] == num_heads:
        return x.narrow(dim, span[0], span[1] - span[0])
    return x


@dataclass(frozen=True)
class AttentionCall:
    """The call of an attention module that is to be run on heads: all but queries, keys and values.

    Attributes:
        inner: any Hugging Face attention function.
        module: what it gets as `module`.
        mask: whatever it takes for the FULL row; an entry per head is cut to this rank's.
        num_heads: H, by which entries per head are known.
        options: keyword arguments of the function.
    """

    inner: Inner
    module: torch.nn.Module | ModuleView
    mask: Any
    num_heads: int
    options: dict[str, Any]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layout: HeadLayout, rank: int) -> Tensor:
        """[B, S, h, D] of this rank's heads [B, h, S, D], as `layout` has them. No collective."""
        span, counts = layout.query[rank], layout.counts(rank)
        if len(set(counts)) > 1:  # attention functions repeat every key/value head equally often
            key, value, counts = _repeat_heads(key, counts), _repeat_heads(value, counts), [1]
        overrides: dict[str, Any] = {"num_key_value_groups": counts[0]}
        if isinstance(sinks := getattr(self.module, "sinks", None), Tensor):
            overrides["sinks"] = _slice_per_head(sinks, 0, span, self.num_heads)
        options = dict(self.options)
        for name, dim in (("s_aux", 0), ("position_bias", 1)):
            if options.get(name) is None:
                options.pop(name, None)
            else:
                options[name] = _slice_per_head(options[name], dim, span, self.num_heads)
        mask = self.mask
        if isinstance(mask, Tensor) and mask.dim() == 4:
            mask = _slice_per_head(mask, 1, span, self.num_heads)
        return self.inner(ModuleView(self.module, **overrides), query, key, value, mask, **options)[0]


def ulysses_attention(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Run an attention function on this rank's heads of the full rows.

    Args:
        query: local [B, H, s, D]; key and value local [B, G, s, D].

    Returns:
        Local output [B, s, H, D]. There are no attention weights: they would be those of this rank's heads only.

    Collectives: two all-to-alls over `group` (three if the value width differs), and as many in the backward.
    """
    layout = head_layout(query.shape[1], key.shape[1], dist.get_world_size(group))
    query, key, value = sequence_to_heads(query, key, value, layout, group)
    return heads_to_sequence(call.attend(query, key, value, layout, dist.get_rank(group)), layout, group)
