"""In which order a rank runs forwards and backwards of a window: one forward, one backward (1F1B).

    stage 0   F0 F1 F2 F3 B0 F4 B1 F5 B2    B3    B4    B5        6 micro-batches, 4 stages
    stage 1      F0 F1 F2 B0 F3 B1 F4 B2 F5 B3    B4    B5
    stage 2         F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4    B5
    stage 3            F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5

As many forwards first as there are stages after this one, then a backward for each forward: a stage holds activations
of at most `stages - stage` micro-batches, however many a window has, and stands still for `stages - 1` of them. Each
stage's actions follow from its place alone, so that nobody has to hand them out.

With v stages on each of p ranks (interleaved 1F1B) rank r has the stages r, p + r, 2p + r ..: its chunks 0 to v - 1.
A window goes through in groups of p micro-batches, or a few more, so that no group is smaller: all of a group in chunk
0, then all of it in chunk 1. A rank stands still for (p - 1) / v micro-batches, and holds more of them: 2 (p - r - 1)
+ (v - 1) p + 1 forwards of a chunk at most, of which each has a v-th of the layers.

torch.distributed.pipelining has these orders too, and more. Its `PipelineStage` (torch 2.11 to 2.13) has buffers of
one shape for all micro-batches of a run, while packed rows differ in length; what crosses has to be arguments and
outputs of a module, where here it enters and leaves in the midst of a model's forward; and the list of actions without
the rest is private. What this package needs of it is the functions below.

Source: PipeDream-Flush (arXiv 2006.09503); Megatron-LM (arXiv 2104.04473), sections 2.2 and 2.3.
"""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """`backward` of the micro-batch with this index in this chunk of the rank, else its forward."""

    backward: bool
    index: int
    chunk: int = 0


def one_forward_one_backward(rank: int, ranks: int, count: int, chunks: int = 1) -> list[Action]:
    """The actions of `rank`, 0 to `ranks` - 1, for `count` micro-batches, with `chunks` stages on each rank."""
    groups = _groups(count, ranks)
    forwards = [Action(False, index, chunk) for group in groups for chunk in range(chunks) for index in group]
    backwards = [
        Action(True, index, chunk) for group in groups for chunk in reversed(range(chunks)) for index in group
    ]
    after = ranks - rank - 1
    ahead = min(after if chunks == 1 else 2 * after + (chunks - 1) * len(groups[0]), len(forwards))
    actions = forwards[:ahead]
    for number, backward in enumerate(backwards):
        actions += [*forwards[ahead + number : ahead + number + 1], backward]
    return actions


def _groups(count: int, ranks: int) -> list[range]:
    """Micro-batches in groups of `ranks` or a few more, the larger ones first; fewer than `ranks` are one group."""
    number = max(1, count // ranks)
    small, larger = divmod(count, number)
    ends = [small * place + min(place, larger) for place in range(number + 1)]
    return [range(begin, end) for begin, end in zip(ends[:-1], ends[1:], strict=True)]
