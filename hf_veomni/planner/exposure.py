"""What of the exchanges of tokens (sp, ep) computation hides, in a layer.

    none     nothing
    chunks   the first chunk's way in and the last one's way out have nothing to hide under; in between, while chunk i
             is computed, the next one comes in and the one before goes out
    pairs    what one sequence sends at the end of a segment of compute travels under the same segment of the other
             one, whose own travels under the segment after it

A layer is a cycle of segments with an exchange behind each. Its forward, a recomputation, and its backward are passes;
each has the same exchanges.
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


def bare_pairs(segments: Sequence[Segment], passes: Sequence[bool]) -> dict[str, float]:
    """Exposed seconds of one of two sequences by axis; `passes`: for each, whether it is the backward."""
    found = dict.fromkeys((segment.axis for segment in segments), 0.0)
    for backward in passes:
        computed = [s.seconds * (s.backward if backward else 1) for s in segments]
        for index, segment in enumerate(segments):
            around = computed[index], computed[(index + 1) % len(segments)]
            found[segment.axis] += sum(max(0.0, segment.sent - seconds) for seconds in around) / 2
    return found


def bare_chunks(chunked: Chunked, passes: Sequence[bool]) -> float:
    """Exposed seconds."""
    number, found = len(chunked.come), 0.0
    for backward in passes:
        found += chunked.come[0] + chunked.leave[-1]
        for index in range(number):
            moved = chunked.come[index + 1] if index + 1 < number else 0.0
            moved += chunked.leave[index - 1] if index else 0.0
            found += max(0.0, moved - chunked.seconds[index] * (chunked.backward if backward else 1))
    return found
