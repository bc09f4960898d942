"""Features that a backbone adds to images' tokens after some of its layers (Qwen3-VL's deepstack): cut to the
slice."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.shard import shard_sequence


def cut_deepstack(inputs: dict[str, Any], padded: int, state: ParallelState) -> dict[str, Any]:
    """A backbone's inputs with the mask and the features of this rank's tokens only.

    Args:
        inputs: `visual_pos_masks` [B, S], true for a token of an image or video, and `deepstack_visual_embeds`, for
            each of some layers the features [n, C] of the true ones in order. Without them nothing changes.
        padded: S', to which the row is filled up with tokens of no image.
    """
    mask, features = inputs.get("visual_pos_masks"), inputs.get("deepstack_visual_embeds")
    if not isinstance(mask, Tensor) or state.sp_size == 1:
        return inputs
    mask = (mask[..., 0] if mask.dim() == 3 else mask).bool()
    places = (mask.flatten().cumsum(0) - 1).view_as(mask)
    extra = padded - mask.shape[1]
    local = shard_sequence(F.pad(mask, (0, extra)), 1, state)
    rows = shard_sequence(F.pad(places, (0, extra)), 1, state)[local]
    return {
        **inputs,
        "visual_pos_masks": local,
        "deepstack_visual_embeds": None if features is None else [layer[rows] for layer in features],
    }
