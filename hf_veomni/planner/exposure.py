"""What of the exchanges of tokens (sp, ep) computation hides, in a layer.

    none     nothing
    chunks   the first chunk's way in and the last one's way out have nothing to hide under; in between, while chunk i
             is computed, the next one comes in and the one before goes out
    pairs    what one sequence sends at the end of a segment of compute travels under the same segment of the other
             one, whose own travels under the segment after it

A layer is a cycle of segments with an exchange behind each. Its forward, a recomputation, and its backward are passes;
each has the same exchanges. The first segment reaches over the border of two layers: what is behind the last exchange
of one, and in front of the first exchange of the next. At the ends of a pass the two are apart; so they are in each
layer under checkpointing, which makes a frame of a layer that both sequences leave before either enters the next.

Where a layer ends with an exchange (the experts' way out), its gradient travels first of all, while checkpointing
recomputes the layer: `early`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """Compute of a layer, in seconds of a forward, and the exchange behind it.

    Attributes:
        backward: how many times as long its backward takes.
        axis, sent: of the exchange; seconds in each pass.
    """

    seconds: float
    backward: float
    axis: str
    sent: float


class Chunked(NamedTuple):
    """Exchanges in chunks: seconds of each chunk's way in and out, and of what is computed with it in a forward.

    Attributes:
        backward: how many times as long the backward's computation takes.
    """

    come: Sequence[float]
    leave: Sequence[float]
    seconds: Sequence[float]
    backward: float


class Border(NamedTuple):
    """Where layers meet.

    Attributes:
        layers: that a pass goes through.
        front: share of the first segment that is in front of its layer's first exchange.
        framed: whether sequences meet at the end of each layer.
        early: whether the gradient of a layer's last exchange travels under the recomputation.
    """

    layers: int
    front: float
    framed: bool = False
    early: bool = False


def bare_pairs(segments: Sequence[Segment], passes: Sequence[bool], border: Border) -> dict[str, float]:
    """Exposed seconds of one of two sequences by axis; `passes`: for each, whether it is the backward."""
    found = dict.fromkeys((segment.axis for segment in segments), 0.0)
    ended = 1 if border.framed else 1 / border.layers
    last = len(segments) - 1
    for number, backward in enumerate(passes):
        computed = [s.seconds * (s.backward if backward else 1) for s in segments]
        is_early = border.early and backward
        for index, segment in enumerate(segments[:-1] if is_early else segments):
            inside = computed[index], computed[(index + 1) % len(segments)]
            outside = computed[index] * (1 if index else border.front), computed[(index + 1) % len(segments)]
            if index == last:
                outside = outside[0], outside[1] * (1 - border.front)
            for around, share in ((inside, 1 - ended), (outside, ended)):
                found[segment.axis] += share * sum(max(0.0, segment.sent - seconds) for seconds in around) / 2
        if border.early and number == len(passes) - 2:  # the link also has the gradient's exchange in this time
            sent = sum(segment.sent for segment in segments) + segments[-1].sent
            more = sent - sum(computed) - sum(max(0.0, s.sent - c) for s, c in zip(segments, computed, strict=True))
            found[segments[-1].axis] += max(0.0, more)
    return found


def bare_chunks(chunked: Chunked, passes: Sequence[bool], early: bool = False) -> float:
    """Exposed seconds; `early`: the backward's first chunk travels under the recomputation."""
    return sum(_pass_of_chunks(chunked, backward, early and backward) for backward in passes)


def _pass_of_chunks(chunked: Chunked, backward: bool, early: bool) -> float:
    """One pass on a link that takes one transfer after the other: of each chunk, the next one's way in begins before
    its own is awaited, and its way out is awaited at the end."""
    come = (0.0, *chunked.come[1:]) if early else chunked.come
    now, free, found = 0.0, come[0], 0.0
    arrived = free
    for index, seconds in enumerate(chunked.seconds):
        here = arrived
        if index + 1 < len(come):
            arrived = free = max(free, now) + come[index + 1]
        found += max(0.0, here - now)
        now = max(now, here) + seconds * (chunked.backward if backward else 1)
        free = max(free, now) + chunked.leave[index]
    return found + max(0.0, free - now)
