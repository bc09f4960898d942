"""Images, videos and audio in a dry run: what models read from ids and grids, which have values, is computed really.

input_ids, grids      keep their values through the model's own code: masks of placeholders, numbers of features
a mask as an index    becomes the places where it holds, since the size of what it picks is a question to values
towers by grid        get the tables that they compute from it, where `modality/ready.py` has not given them yet
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.families import TOWERS
from hf_veomni.host import as_values, forget, move, on_host
from hf_veomni.modality.ready import tower_tables

_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


def has_encoder_inputs(batch: Mapping[str, Any]) -> bool:
    """Whether a batch holds more than text: something to be encoded."""
    return any(isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 for x in batch.values())


def keeps_values(name: str) -> bool:
    """Whether models read the values of this input, and compute from nothing else there."""
    return name == "input_ids" or name.endswith("grid_thw")


class _MasksAsPlaces(TorchFunctionMode):
    """`x[mask]`, `x[mask] = y` with real masks: with the places where they hold."""

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INDEXING:
            args = (args[0], _places(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def _places(index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    if not any(_is_mask(part) for part in parts):
        return index
    found: list[Any] = []
    for part in parts:
        if _is_mask(part):
            with unset_fake_temporarily():
                found += forget(part).nonzero(as_tuple=True)
        else:
            found.append(part)
    return tuple(found)


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.bool and not isinstance(part, FakeTensor)


def _give_tables(tower: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    inputs = {**dict(zip(inspect.signature(type(tower).forward).parameters, (tower, *args), strict=False)), **kwargs}
    grid = inputs.get("grid_thw")
    if not isinstance(grid, Tensor) or "cu_seqlens" in inputs:
        return None
    tables, edges = tower_tables(tower, tower.config, on_host(grid))
    made = {name: move(table, grid.device) for name, table in tables.items()}
    return args, {**kwargs, **made, **{name: as_values(edge) for name, edge in edges.items()}}


@contextmanager
def encoding(model: nn.Module) -> Iterator[None]:
    """Within it the encoders of a prepared model run on fake tensors.

    Raises:
        UnsupportedError: its own code asks for values that are not there.
    """
    towers = [m for m in hf.towers(hf.base_model(model)) if _kind(m) in TOWERS]
    handles = [tower.register_forward_pre_hook(_give_tables, with_kwargs=True) for tower in towers]
    try:
        with _MasksAsPlaces():
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UnsupportedError(
            f"{type(hf.base_model(model)).__name__} asks for values of its encoder's inputs ({error.func}), which a "
            "dry run does not have: leave images, videos and audio out of `batch`, and count the encoder's share "
            "yourself."
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _kind(module: nn.Module) -> Any:
    return getattr(getattr(module, "config", None), "model_type", None)


def image_batch(config: object, tokens: int, grids: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
    """One packed sequence of `tokens` tokens that begins with these images, as a collator makes it.

    Args:
        config: of a model whose tower goes by grids (`TOWERS`).
        grids: patches of each image: frames, height, width.

    Raises:
        UnsupportedError: a model of another kind.
        ValueError: grids that are no multiple of what the tower merges, or more image tokens than `tokens`.
    """
    vision: Any = getattr(config, "vision_config", None)
    token = getattr(config, "image_token_id", None)
    if getattr(vision, "model_type", None) not in TOWERS or not isinstance(token, int):
        raise UnsupportedError(
            f"A dry run cannot make images for '{getattr(config, 'model_type', None)}': pass a `batch`, as its "
            "processor makes it."
        )
    merge: int = vision.spatial_merge_size
    for grid in grids:
        if len(grid) != 3 or min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise ValueError(f"`grids` holds {grid}: it must be (frames, height, width) in multiples of {merge}.")
    patches = [t * h * w for t, h, w in grids]
    images = sum(patches) // merge**2
    if images > tokens - 2:
        raise ValueError(f"`grids` make {images} tokens, and `tokens` ({tokens}) must hold these and 2 of text.")
    ids = torch.ones(1, tokens, dtype=torch.long)
    ids[:, :images] = token
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    width = channels * getattr(vision, "temporal_patch_size", 2) * vision.patch_size**2
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == token, -100),
        "position_ids": torch.arange(tokens)[None],
        "pixel_values": torch.empty(sum(patches), width),
        "image_grid_thw": torch.tensor(grids, dtype=torch.long),
    }
