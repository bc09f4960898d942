"""In which order a stage runs forwards and backwards of a window: one forward, one backward (1F1B).

    stage 0   F0 F1 F2 F3 B0 F4 B1 F5 B2    B3    B4    B5        6 micro-batches, 4 stages
    stage 1      F0 F1 F2 B0 F3 B1 F4 B2 F5 B3    B4    B5
    stage 2         F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4    B5
    stage 3            F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5

As many forwards first as there are stages after this one, then a backward for each forward: a stage holds activations
of at most `stages - stage` micro-batches, however many a window has, and stands still for `stages - 1` of them. Each
stage's actions follow from its place alone, so that nobody has to hand them out.

torch.distributed.pipelining has this order too, and more. Its `PipelineStage` (torch 2.11 to 2.13) has buffers of one
shape for all micro-batches of a run, while packed rows differ in length; what crosses has to be arguments and outputs
of a module, where here it enters and leaves in the midst of a model's forward; and the list of actions without the
rest is private. What this package needs of it is the function below.

Source: PipeDream-Flush (arXiv 2006.09503); Megatron-LM (arXiv 2104.04473), section 2.2.
"""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """`backward` of the micro-batch with this index, else its forward."""

    backward: bool
    index: int


def one_forward_one_backward(stage: int, stages: int, count: int) -> list[Action]:
    """The actions of `stage`, 0 to `stages` - 1, for `count` micro-batches."""
    ahead = min(stages - stage - 1, count)
    actions = [Action(False, index) for index in range(ahead)]
    for index in range(count):
        if ahead + index < count:
            actions.append(Action(False, ahead + index))
        actions.append(Action(True, index))
    return actions
