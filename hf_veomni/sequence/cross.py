"""Cross-attention of a cut backbone: this rank's queries against full keys, without an exchange.

    queries    [B, H, s, D]    of this rank's tokens
    keys       [B, K, E, D]    of all tokens of the encoder, the same on every rank
    mask       [B, 1, S', E]   made for the full row, or [B, 1, 1, E]; this rank's queries are cut out

The output is this rank's [B, s, H, D]. The gradient of the keys is that of this rank's queries alone; where they come
from a cut encoder, its gather point adds the ranks' up (`gather_points`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.attention.mask import MaskSpec
from hf_veomni.attention.mask_reader import required
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState

# What attention modules call the states of another sequence.
_STATES = ("key_value_states", "encoder_hidden_states", "cross_attention_states", "vision_hidden_states")
_FLAG = "_omni_cross"


def can_cross(module: nn.Module) -> bool:
    """Whether an attention module takes keys of another sequence."""
    return any(name in _parameters(module) for name in _STATES)


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def merges_keys(module: nn.Module) -> bool:
    """Whether an attention joins the keys of another sequence to its own (T5Gemma 2)."""
    return any(name.startswith("merged_") for name in _parameters(module))


def watch_cross(module: nn.Module) -> Any:
    """Have `is_cross` tell whether the running call of an attention module attends to another sequence."""
    names = _parameters(module)

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        module.__dict__[_FLAG] = any(isinstance(inputs.get(name), Tensor) for name in _STATES)

    return module.register_forward_pre_hook(note, with_kwargs=True)


def is_cross(module: nn.Module) -> bool:
    return module.__dict__.get(_FLAG, False)


def cross_attention(
    function: hf.AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    state: ParallelState,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Run an attention function on this rank's queries [B, H, s, D] and full keys [B, K, E, D]."""
    if isinstance(mask, MaskSpec):  # made where both sequences have the same length
        mask = _dense(mask)
    mask = cut_queries(module, mask, query.shape[2], state)
    return function(module, query, key, value, mask, **kwargs)


def cut_queries(module: nn.Module, mask: Any, tokens: int, state: ParallelState) -> Any:
    """The rows of a cross-attention's mask that belong to this rank's `tokens`, where it has one for each query."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-2] == 1 or state.sp_size == 1:
        return mask
    missing = tokens * state.sp_size - mask.shape[-2]
    if 0 <= missing < state.sp_size:  # a mask made above the backbone knows nothing of the padding
        return F.pad(mask, (0, 0, 0, missing)).narrow(-2, tokens * state.sp_rank, tokens)
    raise UnsupportedError(
        f"The mask of a cross-attention ({type(module).__name__}) has shape {tuple(mask.shape)}, not "
        f"[.., {tokens * state.sp_size} or 1, keys], so it cannot be cut: use sp_size=1."
    )


def _dense(spec: MaskSpec) -> Tensor:
    """Bool [B, 1, S', E] of a mask whose padding is that of the keys."""
    masks: Callable[..., Tensor] = required("sdpa_mask")
    return masks(
        batch_size=spec.num_rows,
        q_length=spec.row_length,
        kv_length=spec.row_length,
        q_offset=0,
        kv_offset=0,
        mask_function=spec.function,
        attention_mask=None if spec.padding is None else spec.padding.to(torch.bool),
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=spec.device,
    )
