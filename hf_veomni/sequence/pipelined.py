"""Ulysses in chunks of heads: the exchanges of a chunk run under the attention of its neighbours.

    exchange   | q k v 0 | q k v 1 | out 0 | q k v 2 | out 1 |      ...       | out n-1 |
    compute              | attention 0     | attention 1     | attention 2 ... |

The first exchange in and the last one out have nothing to hide under, 1/n of all where links are fast enough. Only the
full-length q, k and v of two chunks are alive in a forward without gradients (the first one under activation
checkpointing), where the blocking form has those of all heads.

The backward needs no order of its own: autograd runs the nodes that are ready newest first, so it is the same pipeline
from the end: gradients of chunk n-1 go out under the attention's backward of chunk n-2. A key/value head that query
heads of two chunks read is sent once, with the first of them, and its gradient is complete with the last.

Shapes: as in `ulysses`; n chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.comm.all_to_all import Flight, give_way, land, launch
from hf_veomni.sequence.ulysses import (
    EXCHANGED,
    AttentionCall,
    HeadLayout,
    PackHeads,
    Spans,
    head_layout,
    join_exchanges,
    pack_output,
    split_sizes,
    unpack_heads,
)

MOST_CHUNKS = 8


@lru_cache(maxsize=64)
def chunk_layouts(layout: HeadLayout, most: int = MOST_CHUNKS) -> tuple[tuple[HeadLayout, Spans], ...]:
    """Each chunk's query heads and those that they read, and which of the latter it is the first to read, by rank.

    As many chunks as every rank has query heads, `most` at most; rather fewer than chunks whose key/value heads are
    read by different numbers of query heads, for which attention functions would have to repeat them.
    """
    fewest = min(last - first for first, last in layout.query)
    choices = [_cut(layout, number) for number in range(min(most, fewest), 0, -1)]
    ranks = range(len(layout.query))
    even = (cut for cut in choices if all(len(set(part.counts(rank))) == 1 for part in cut for rank in ranks))
    cut = next((cut for cut in even if len(cut) > 1), choices[0])
    found, read = [], [low for low, _ in layout.key_value]
    for part in cut:
        fresh = tuple((max(low, begin), high) for (low, high), begin in zip(part.key_value, read, strict=True))
        read = [high for _, high in part.key_value]
        found.append((part, fresh))
    return tuple(found)


def _cut(layout: HeadLayout, number: int) -> list[HeadLayout]:
    parts = []
    for chunk in range(number):
        query = tuple(
            (first + (last - first) * chunk // number, first + (last - first) * (chunk + 1) // number)
            for first, last in layout.query
        )
        read = tuple((first // layout.group, (last - 1) // layout.group + 1) for first, last in query)
        parts.append(HeadLayout(query, read, layout.group))
    return parts


class _Arrivals:
    """The exchanges of q, k and v, chunk by chunk."""

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],
        chunks: tuple[tuple[HeadLayout, Spans], ...],
        group: dist.ProcessGroup,
    ) -> None:
        self.chunks, self.group, self.rank = chunks, group, dist.get_rank(group)
        widths = tensors[1].shape[-1], tensors[2].shape[-1]
        self.exchanges = [join_exchanges(part.query, fresh, widths) for part, fresh in chunks]
        self._packed = list(PackHeads.apply(tuple(chain.from_iterable(self.exchanges)), *tensors))
        self._flights: list[list[Flight]] = []
        self._carried: tuple[Tensor, ...] = ()  # the last key and value head of the chunk before

    def launch_next(self) -> None:
        """Start the next chunk's exchanges; nothing if all are on their way."""
        if len(self._flights) == len(self.chunks):
            return
        exchanges = self.exchanges[len(self._flights)]
        flights = [launch(self._packed.pop(0), self.group, *split_sizes(parts, self.rank)) for parts in exchanges]
        self._flights.append(flights)

    def land(self, chunk: int) -> list[Tensor]:
        """Query [B, n, S, D], and the key and value heads that it reads; chunks in order."""
        layout, fresh = self.chunks[chunk]
        pairs = zip(self._flights[chunk], self.exchanges[chunk], strict=True)
        query, *rest = chain.from_iterable(unpack_heads(land(flight), parts, self.rank) for flight, parts in pairs)
        if fresh[self.rank][0] > layout.key_value[self.rank][0]:  # the first one came with the chunk before
            # Where nothing else came, what is there is read, not copied; but for values that came by themselves, whose
            # exchange has a backward on all ranks or none.
            joint = len(self.exchanges[chunk]) == 1
            both = zip(self._carried, rest, strict=True)
            rest = [old if joint and not new.shape[1] else torch.cat((old, new), dim=1) for old, new in both]
        self._carried = tuple(x[:, -1:] for x in rest)
        return [query, *rest]


def pipelined_attention(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """`ulysses_attention`, in chunks of heads; one chunk where a rank has a single query head.

    Collectives: two all-to-alls a chunk over `group` (three if the value width differs), and as many in the backward.
    They are as many bytes as those of the blocking form.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    chunks = chunk_layouts(head_layout(query.shape[1], key.shape[1], size))
    arrivals = _Arrivals((query, key, value), chunks, group)
    flights: list[Flight] = []
    landed: list[Tensor] = []
    arrivals.launch_next()
    give_way()
    for chunk, (layout, _) in enumerate(chunks):
        arrivals.launch_next()
        q, k, v = arrivals.land(chunk)
        out = call.attend(q, k, v, layout, rank)
        del q, k, v
        packed, send, receive = pack_output(out, layout, rank)
        flights.append(launch(packed, group, send, receive))
        del out, packed
        if chunk:
            landed.append(land(flights[chunk - 1]))
    give_way()
    landed.append(land(flights[-1]))  # [heads of all ranks, B, s, D] each
    parts = [iter(x.split([b - a for a, b in layout.query])) for x, (layout, _) in zip(landed, chunks, strict=True)]
    heads = torch.cat([next(part) for _ in range(size) for part in parts])
    return heads.permute(1, 2, 0, 3).contiguous()


def pipeline(attention: torch.nn.Module) -> Callable[[], Any]:
    """Have an attention module exchange in chunks. Returns what undoes it."""
    vars(attention)[EXCHANGED] = pipelined_attention
    return partial(vars(attention).pop, EXCHANGED, None)
