"""What a tower is called with, as items that can be encoded one by one: images, videos, audio.

    patches and grid    pixel_values [P, D], image_grid_thw [n, 3]     Qwen-VL, Qwen-Omni, GLM-V; a long video in runs
    items first         pixel_values [n, ..], masks and sizes [n, ..]  LLaVA (videos too), Gemma 3, InternVL, Voxtral
    rows of items       pixel_values [B, m, C, H, W], zeros as padding  Idefics 3, SmolVLM
    audio clips and masks    input_features [n, bins, T], mask [n, T]       Qwen-Omni, which is called for each clip

A cost is in patches: attention is quadratic in those of one frame, the rest linear.

A video of the towers in `TOWERS` is as many images as it has temporal patches: attention and windows end with each,
and positions are those within it. So runs of its frames are items too, which are joined again behind the tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hf_veomni.host import make, on_host, remember

Arguments = dict[str, Any]

# Runs of frames that are worth a rank's share: the more, the nearer the shares, and the more items.
_RUNS_OF_A_SHARE = 8


@dataclass(frozen=True)
class Items:
    """The items of one call.

    Attributes:
        costs: of each item, [n], any unit.
        select: arguments of a call for the items of these indices.
        one_by_one: the tower joins what items give, so that only a call for each tells their rows apart.
        patches: of each item, where a grid tells.
        parts: of each thing that the caller counts (a full video), the items that it was cut into; None for one each.
    """

    costs: list[float]
    select: Callable[[Sequence[int]], Arguments]
    one_by_one: bool = False
    parts: list[int] | None = None
    patches: list[int] | None = None

    def join(self, sizes: Sequence[int]) -> list[int]:
        """Rows of each thing that the caller counts, from the rows of each item."""
        left = iter(sizes)
        return list(sizes) if self.parts is None else [sum(islice(left, count)) for count in self.parts]


def find_items(arguments: Arguments, width: int, num_ranks: int = 0) -> Items | None:
    """The items in the arguments of a `get_*_features` method, by name; None where they cannot be told apart.

    Args:
        arguments: with their names. Shapes as above.
        width: of the tower's hidden states, which says from how many patches on attention outweighs the rest.
        num_ranks: that share the items, where a long video may be cut into runs of frames (`TOWERS`); 0 leaves each
            video in full.
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
        return _by_grid(arguments, name, grid, width, num_ranks) if len(tensors) == 1 and values.dim() == 2 else None
    if values.dim() == 5 and "pixel_attention_mask" in arguments:
        return _in_rows(arguments, name)
    images = tensors.get("batch_num_images")  # of a sample, which are cut into patches where there is one alone
    if images is not None and bool((on_host(images) != 1).any()):
        return None
    if any(x.dim() == 0 or x.shape[0] != len(values) for x in tensors.values()):
        return None
    if name == "input_features" and any("mask" in key for key in tensors):
        return _sounds(arguments, name, tensors)
    return _first(arguments, [name, *tensors], values)


def _cost(patches: int, frames: int, width: int) -> float:
    """12 width^2 a patch for the linear layers (and 2 in the norms' stead), 2 width for each pair that attends."""
    return frames * patches * (6.0 * width + patches)


def _by_grid(arguments: Arguments, name: str, grid: str, width: int, num_ranks: int) -> Items:
    sizes = on_host(arguments[grid]).tolist()
    parts = _count_runs(sizes, width, num_ranks)
    sizes = [run for size, count in zip(sizes, parts, strict=True) for run in _cut_frames(*size, count)]
    blocks = arguments[name].split([math.prod(size) for size in sizes])
    kind, device = arguments[grid].dtype, arguments[grid].device

    def select(indices: Sequence[int]) -> Arguments:
        chosen = remember(make(torch.tensor, [sizes[i] for i in indices], dtype=kind), device)
        return {**arguments, name: torch.cat([blocks[i] for i in indices]), grid: chosen}

    costs = [_cost(h * w, t, width) for t, h, w in sizes]
    return Items(costs, select, parts=parts, patches=[math.prod(size) for size in sizes])


def _count_runs(sizes: list[list[int]], width: int, num_ranks: int) -> list[int]:
    """Runs for each video: so many that none costs much more than a fraction of a rank's share, else one."""
    costs = [_cost(h * w, t, width) for t, h, w in sizes]
    most = sum(costs) / max(num_ranks, 1) / _RUNS_OF_A_SHARE
    if not num_ranks or not most:
        return [1] * len(sizes)
    return [min(t, math.ceil(cost / most - 1e-6)) for (t, _, _), cost in zip(sizes, costs, strict=True)]


def _cut_frames(t: int, h: int, w: int, count: int) -> list[list[int]]:
    """Grids of `count` runs of consecutive frames, as even as can be."""
    small, longer = divmod(t, count)
    return [[small + (i < longer), h, w] for i in range(count)]


def _first(arguments: Arguments, names: Sequence[str], values: Tensor) -> Items:
    sizes = arguments.get("image_sizes")
    costs = [1.0] * len(values) if sizes is None else on_host(sizes).double().prod(-1).tolist()

    def select(indices: Sequence[int]) -> Arguments:
        return {**arguments, **{name: arguments[name][list(indices)] for name in names}}

    return Items(costs, select)


def _in_rows(arguments: Arguments, name: str) -> Items | None:
    """[B, m, ..] as one row of its real images. The features of several rows would come apart at other places."""
    values: Tensor = arguments[name]
    masks = {key: x for key, x in arguments.items() if isinstance(x, Tensor) and key != name}
    if len(values) != 1 or any(x.shape[:2] != values.shape[:2] for x in masks.values()):
        return None
    real = on_host((values[0] != 0).flatten(1).any(1)).nonzero().flatten().tolist()

    def select(indices: Sequence[int]) -> Arguments:
        chosen = [real[i] for i in indices]
        return {**arguments, **{key: arguments[key][:, chosen] for key in (name, *masks)}}

    return Items([1.0] * len(real), select, one_by_one=True) if real else None


def _sounds(arguments: Arguments, name: str, others: dict[str, Tensor]) -> Items:
    lengths = on_host(next(x for key, x in others.items() if "mask" in key)).sum(-1).tolist()

    def select(indices: Sequence[int]) -> Arguments:
        return {**arguments, **{key: arguments[key][list(indices)] for key in (name, *others)}}

    return Items([float(length) for length in lengths], select, one_by_one=True)
