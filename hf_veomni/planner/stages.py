"""Pipeline stages of a shape: the layers of each, cut as the pipeline cuts a model."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from hf_veomni.pipeline.split import split_layers
from hf_veomni.planner.shape import Shape


@lru_cache(maxsize=256)
def cut_shape(shape: Shape, stages: int) -> tuple[Shape, ...]:
    """What each stage has: its layers, the first one the embeddings, the last one the head."""
    if stages == 1:
        return (shape,)
    ranges = split_layers([layer.active for layer in shape.layers], shape.embedding, stages)
    cut = []
    for stage, own in enumerate(ranges):
        first, last = stage == 0, stage == stages - 1
        cut.append(
            replace(
                shape,
                order=shape.order[own.start : own.stop],
                windows=shape.windows[own.start : own.stop],
                root=(shape.head if shape.tied else shape.root) if first else (),
                head=shape.head if last else (),
                embeds=first,
                ends=last,
            )
        )
    return tuple(cut)
