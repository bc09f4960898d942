"""What a tower is called with, as items that can be encoded one by one: pictures, videos, sounds.

    patches and grid    pixel_values [P, D], image_grid_thw [n, 3]     Qwen-VL, Qwen-Omni, GLM-V
    items first         pixel_values [n, ..], masks and sizes [n, ..]  LLaVA (videos too), Gemma 3, InternVL, Voxtral
    rows of items       pixel_values [B, m, C, H, W], zeros as filler  Idefics 3, SmolVLM
    sounds and masks    input_features [n, bins, T], mask [n, T]       Qwen-Omni, which is called for each sound

A cost is in patches: attention is quadratic in those of one frame, the rest linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Items:
    """The items of one call.

    Attributes:
        costs: of each item, [n], any unit.
        select: arguments of a call for the items of these indices.
        one_by_one: the tower joins what items give, so that only a call for each tells their rows apart.
    """

    costs: list[float]
    select: Callable[[Sequence[int]], Arguments]
    one_by_one: bool = False


def find_items(arguments: Arguments, width: int) -> Items | None:
    """The items in the arguments of a `get_*_features` method, by name; None where they cannot be told apart.

    Args:
        arguments: with their names. Shapes as above.
        width: of the tower's hidden states, which says from how many patches on attention outweighs the rest.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    if any(
        isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value) for value in arguments.values()
    ):
        return None
    name = next(iter(tensors), "")
    values = tensors.pop(name, None)
    if values is None or values.dim() < 2:
        return None
    grid = next((key for key in tensors if key.endswith("grid_thw")), None)
    if grid is not None:
        return _by_grid(arguments, name, grid, width) if len(tensors) == 1 and values.dim() == 2 else None
    if values.dim() == 5 and "pixel_attention_mask" in arguments:
        return _in_rows(arguments, name)
    pictures = tensors.get("batch_num_images")  # of a sample, which are cut into patches where there is one alone
    if pictures is not None and bool((pictures != 1).any()):
        return None
    if any(x.dim() == 0 or x.shape[0] != len(values) for x in tensors.values()):
        return None
    if name == "input_features" and any("mask" in key for key in tensors):
        return _sounds(arguments, name, tensors)
    return _first(arguments, [name, *tensors], values)


def _cost(patches: int, frames: int, width: int) -> float:
    """12 width^2 a patch for the linear layers (and 2 in the norms' stead), 2 width for each pair that attends."""
    return frames * patches * (6.0 * width + patches)


def _by_grid(arguments: Arguments, name: str, grid: str, width: int) -> Items:
    sizes = arguments[grid].tolist()
    blocks = arguments[name].split([math.prod(size) for size in sizes])

    def select(indices: Sequence[int]) -> Arguments:
        return {**arguments, name: torch.cat([blocks[i] for i in indices]), grid: arguments[grid][list(indices)]}

    return Items([_cost(h * w, t, width) for t, h, w in sizes], select)


def _first(arguments: Arguments, names: Sequence[str], values: Tensor) -> Items:
    sizes = arguments.get("image_sizes")
    costs = [1.0] * len(values) if sizes is None else sizes.double().prod(-1).tolist()

    def select(indices: Sequence[int]) -> Arguments:
        return {**arguments, **{name: arguments[name][list(indices)] for name in names}}

    return Items(costs, select)


def _in_rows(arguments: Arguments, name: str) -> Items | None:
    """[B, m, ..] as one row of its real pictures. The features of several rows would come apart at other places."""
    values: Tensor = arguments[name]
    masks = {key: x for key, x in arguments.items() if isinstance(x, Tensor) and key != name}
    if len(values) != 1 or any(x.shape[:2] != values.shape[:2] for x in masks.values()):
        return None
    real = (values[0] != 0).flatten(1).any(1).nonzero().flatten().tolist()

    def select(indices: Sequence[int]) -> Arguments:
        chosen = [real[i] for i in indices]
        return {**arguments, **{key: arguments[key][:, chosen] for key in (name, *masks)}}

    return Items([1.0] * len(real), select, one_by_one=True) if real else None


def _sounds(arguments: Arguments, name: str, others: dict[str, Tensor]) -> Items:
    lengths = next(x for key, x in others.items() if "mask" in key).sum(-1).tolist()

    def select(indices: Sequence[int]) -> Arguments:
        return {**arguments, **{key: arguments[key][list(indices)] for key in (name, *others)}}

    return Items([float(length) for length in lengths], select, one_by_one=True)
