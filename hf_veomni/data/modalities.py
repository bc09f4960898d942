"""What the columns of a multimodal sample hold, and how the columns of several samples become those of one row.

Two kinds beside `input_ids`: a token column has one number a token and is joined along the row; an item column counts
patches, images, tiles, videos or audio along its first axis and is joined along that. Decided by name, from tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# One number a token, 0 for text; missing in a sample of text alone.
TOKEN_COLUMNS = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")


@dataclass(frozen=True)
class ItemColumn:
    """A column that counts items along its first axis.

    Attributes:
        modality: "image", "video" or "audio".
        sized_by: columns that tell padding from content. With one of them (or as one of them) samples of different
            further axes are filled up with zeros at their ends; without, they must agree.
    """

    modality: str
    sized_by: tuple[str, ...] = ()


_IMAGE_SIZES = ("pixel_attention_mask", "image_sizes", "spatial_shapes", "num_crops")
_AUDIO_SIZES = ("feature_attention_mask", "input_features_mask", "audio_feature_lengths", "audio_seqlens")

# What the processors of transformers 5.23 call them.
ITEM_COLUMNS: Mapping[str, ItemColumn] = {
    "pixel_values": ItemColumn("image", _IMAGE_SIZES),
    "pixel_attention_mask": ItemColumn("image", ("pixel_attention_mask",)),
    "image_grid_thw": ItemColumn("image"),
    "image_grid_hw": ItemColumn("image"),
    "image_sizes": ItemColumn("image"),
    "spatial_shapes": ItemColumn("image"),
    "num_crops": ItemColumn("image"),
    "image_position_ids": ItemColumn("image"),
    "batch_num_images": ItemColumn("image"),
    "pixel_values_videos": ItemColumn("video"),
    "video_grid_thw": ItemColumn("video"),
    "second_per_grid_ts": ItemColumn("video"),
    "video_second_per_grid": ItemColumn("video"),
    "input_features": ItemColumn("audio", _AUDIO_SIZES),
    "feature_attention_mask": ItemColumn("audio", ("feature_attention_mask",)),
    "input_features_mask": ItemColumn("audio", ("input_features_mask",)),
    "audio_feature_lengths": ItemColumn("audio"),
    "audio_seqlens": ItemColumn("audio"),
}
# The grid of patches of each item, and which frames of an audio clip are no padding.
GRIDS = {column.modality: name for name, column in ITEM_COLUMNS.items() if name.endswith("_grid_thw")}
AUDIO_MASKS = ("feature_attention_mask", "input_features_mask")
_WIDTHS = {"image_grid_thw": 3, "video_grid_thw": 3, "image_grid_hw": 2, "image_sizes": 2, "spatial_shapes": 2}
# Columns of raw samples: images and audio that a processor has not seen yet.
RAW_COLUMNS: Mapping[str, str] = {
    **dict.fromkeys(("image", "images"), "image"),
    **dict.fromkeys(("audio", "audios"), "audio"),
    **dict.fromkeys(("video", "videos"), "video"),
}
# What cannot stand beside token ids: raw items, and what codecs take.
UNTOKENISED_COLUMNS = frozenset((*RAW_COLUMNS, "input_values", "audio_values"))
TEXT_COLUMNS = ("messages", "text", "conversations", "prompt", "completion")


def is_raw(sample: Mapping[str, Any]) -> bool:
    """Whether a processor must still read the sample."""
    return "input_ids" not in sample and any(name in sample for name in TEXT_COLUMNS)


def item_tensor(where: str, name: str, values: object) -> Tensor:
    """A column of items as a tensor: integers as they are, or torch.long from lists.

    Raises:
        ValueError: ragged lists, or something else that is no tensor.
    """
    return _rows_of_items(where, name, _as_tensor(where, name, values))


def _rows_of_items(where: str, name: str, values: Tensor) -> Tensor:
    """The sizes of one item alone are a row of sizes."""
    width = _WIDTHS.get(name)
    if width is not None and values.shape == (width,):
        return values[None]
    if width is not None and (values.dim() < 2 or values.shape[-1] != width):
        raise ValueError(
            f"{where}: `{name}` has shape {list(values.shape)} and must be [items, {width}], one row for each item."
        )
    return values


def _as_tensor(where: str, name: str, values: object) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        values = _stacked(values)
        if isinstance(values, Tensor):
            return values
        array = np.asarray(values)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "iufb":
        raise ValueError(
            f"{where}: `{name}` is no array of numbers but {type(values).__name__} (type {array.dtype}): pass "
            "what the processor makes of one sample with return_tensors='pt'."
        )
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array))


def _stacked(values: object) -> Any:
    """Lists of tensors as one tensor, of any dtype: numpy has no bf16."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not len(values):
        return values
    inner = [_stacked(value) for value in values] if isinstance(values[0], Tensor | list | tuple) else values
    if not all(isinstance(value, Tensor) for value in inner):
        return values
    if len({value.shape for value in inner}) > 1:
        raise ValueError("tensors of different shapes.")
    return torch.stack([value.detach().cpu() for value in inner])


def without_rows(where: str, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Items of one sample without the axis of rows that some families put first: [1, images, ...] -> [images, ...].

    Idefics 2 and 3 and SmolVLM do so, and are known by a mask of one number a pixel, [rows, images, height, width].

    Raises:
        ValueError: several rows.
    """
    mask = items.get("pixel_attention_mask")
    if mask is None or mask.dim() != 4:
        return dict(items)
    plain = dict(items)
    for name in ("pixel_values", "pixel_attention_mask"):
        if name in plain and len(plain[name]) != 1:
            raise ValueError(f"{where}: `{name}` holds {len(plain[name])} rows: call the processor for each sample.")
        plain |= {name: plain[name][0]} if name in plain else {}
    return plain


def join_items(samples: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """Item columns of several samples in one, in order: [items, ...] each.

    Args:
        samples: items by column of each sample. A sample may lack a modality, but not a column of one that it has.
        names: what to call the samples in messages.

    Raises:
        ValueError: a sample has images (or videos, or audio clips) and lacks a column that others have for theirs;
            axes that differ and that no column tells the padding of.
    """
    has_rows = any(sample["pixel_attention_mask"].dim() == 4 for sample in samples if "pixel_attention_mask" in sample)
    plain = [without_rows(where, sample) for where, sample in zip(names, samples, strict=True)]
    columns = dict.fromkeys(name for sample in plain for name in sample)
    joined = {}
    for name in columns:
        modality = modality_of(name)
        parts = []
        for where, sample in zip(names, plain, strict=True):
            if name in sample:
                parts.append((where, sample[name]))
            elif any(modality_of(other) == modality for other in sample):
                raise ValueError(
                    f"{where}: `{name}` is missing here and present elsewhere in the batch, though the sample has "
                    f"{modality} columns ({', '.join(sorted(sample))}): use the same processor for all samples."
                )
        sized = name not in ITEM_COLUMNS or any(other in columns for other in ITEM_COLUMNS[name].sized_by)
        joined[name] = _join(name, parts, fills=sized)
    if has_rows:
        joined |= {name: joined[name][None] for name in ("pixel_values", "pixel_attention_mask") if name in joined}
    return joined


def modality_of(name: str) -> str:
    """The modality of an item column; a column that was named by the user is its own."""
    return ITEM_COLUMNS[name].modality if name in ITEM_COLUMNS else name


def _join(name: str, parts: Sequence[tuple[str, Tensor]], fills: bool) -> Tensor:
    first_where, first = parts[0]
    for where, part in parts:
        if part.dim() != first.dim() or not part.dim() or (not fills and part.shape[1:] != first.shape[1:]):
            raise ValueError(
                f"`{name}` has shape {list(first.shape)} in {first_where} and {list(part.shape)} in {where}: all axes "
                "but the first must agree, or a mask of the padding stand beside it: use the same processor and "
                "options for all samples."
            )
    shape = torch.tensor([list(part.shape[1:]) for _, part in parts]).amax(dim=0).tolist() if first.dim() > 1 else []
    filled = []
    for _, part in parts:
        missing = [want - have for want, have in zip(shape, part.shape[1:], strict=True)]
        around = [size for count in reversed(missing) for size in (0, count)]
        filled.append(F.pad(part, around) if any(missing) else part)
    wide = reduce(torch.promote_types, (part.dtype for part in filled))  # [1] beside [0.5] in a list of numbers
    return torch.cat([part.to(wide) for part in filled])
