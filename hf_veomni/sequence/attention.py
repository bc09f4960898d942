"""What the attention modules of a prepared model call: the selected function, between the exchanges of a cut sequence.

transformers' attention modules look their function up by a name in their config. Those of a prepared model get a view
of that config (`hf.AttentionConfig`) with a name of their own, under which the function is registered that exchanges
tokens for heads (`ulysses`) around the one that the model has selected: "omni|sdpa" for "sdpa". The view is
seen by nobody else: the config that users see and save has the name of the inner function, entries of transformers'
registry stay what they are, and other models on the same config never get here.

Cross-attention takes this rank's queries and full keys, without an exchange:

    queries    [B, H, s, D]    of this rank's tokens
    keys       [B, G, X, D]    of all tokens of the encoder, the same on every rank
    mask       [B, 1, S', X]   made for the full row, or [B, 1, 1, X]; this rank's queries are cut out

The output is this rank's [B, s, H, D]. The gradient of the keys is that of this rank's queries alone; where they come
from a cut encoder, its gather point adds the ranks' up (`gather_points`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_veomni import hf
from hf_veomni.attention.mask import MaskSpec
from hf_veomni.attention.mask_reader import required
from hf_veomni.context import current
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.ulysses import EXCHANGED, AttentionCall, ModuleView, ulysses_attention

_PREFIX = "omni|"  # as transformers' own "paged|"
# What attention modules call the states of another sequence.
_STATES = ("key_value_states", "encoder_hidden_states", "cross_attention_states", "vision_hidden_states")
_FLAG = "_omni_cross"


class OwnAttention:
    """The views of their configs that the attention modules of one model have; `remove` takes them off again."""

    def __init__(self, modules: Sequence[nn.Module], state: ParallelState) -> None:
        views: dict[int, hf.AttentionConfig] = {}
        for module in modules:
            config: Any = module.config
            view = views.setdefault(id(config), hf.AttentionConfig(config, state))
            vars(module)["config"] = view
        self.modules, self.views = list(modules), list(views.values())
        for view in self.views:
            view.select(_own_name(view.selected))

    def follow(self, cut: bool) -> None:
        """Have the modules call what their configs select now, which may have changed since.

        Args:
            cut: whether they are to run on slices of a row.

        Raises:
            UnsupportedError: an attention that cannot run between the exchanges, of a cut row.
        """
        for view in self.views:
            name = hf.attention_name(view.shared)
            own = view.selected if name == view.followed else view.select(_own_name(name))
            if own == name and cut:
                raise UnsupportedError(
                    f"Attention '{name}' is unknown to transformers' AttentionInterface: register it."
                )
            if name == "eager" and cut and any(map(_upcasts, self.modules)):
                raise UnsupportedError(
                    "`reorder_and_upcast_attn` with attention 'eager' computes attention without transformers' "
                    "AttentionInterface, on this rank's tokens alone: set it to False, or select attention 'sdpa'."
                )

    def remove(self) -> None:
        """Give the attention modules the config of the model again."""
        for module in self.modules:
            view = vars(module)["config"]
            if isinstance(view, hf.AttentionConfig):
                vars(module)["config"] = view.shared


def _upcasts(module: nn.Module) -> bool:
    return bool(getattr(module, "reorder_and_upcast_attn", False))


def _own_name(name: str) -> str:
    """The name of the function around attention `name`, which is registered now; `name` where there is none."""
    if name is None or name.startswith("paged|") or not (name == "eager" or name in ALL_ATTENTION_FUNCTIONS):
        return name
    own = f"{_PREFIX}{name}"
    if own not in ALL_ATTENTION_FUNCTIONS:
        hf.register_attention(own, _around(name), masks_of=name)
    return own


def _around(name: str) -> hf.AttentionFunction:
    """Attention `name`, as the registry has it when it is called, between the exchanges of the module's model."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        state, row = module.config.state, current().row
        function = ALL_ATTENTION_FUNCTIONS.get(name) or hf.eager_attention(module)
        full = row is not None and row.full
        group = None if full else state.sp_group
        if is_cross(module) and not (full and state.sp_size > 1):
            group, attention_mask = None, cross_mask(module, attention_mask, query.shape[2], state)
        seen = ModuleView(module, config=module.config.shared)  # of which flash attention asks its own name
        if group is None:
            return function(seen, query, key, value, attention_mask, **kwargs)
        exchanged = vars(module).get(EXCHANGED, ulysses_attention)
        call = AttentionCall(function, seen, attention_mask, query.shape[1], kwargs)
        return exchanged(call, query, key, value, group), None

    return torch.compiler.disable(attention)  # pyright: ignore (what it reads of the row would be frozen into a graph)


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
    """Whether this attention looks at another sequence than its own."""
    return module.__dict__.get(_FLAG, False)


def cross_mask(module: nn.Module, mask: object, tokens: int, state: ParallelState) -> Any:
    """The mask [B, 1, s, X] or [B, 1, 1, X] of this rank's queries and full keys."""
    if isinstance(mask, MaskSpec):  # made where both sequences have the same length
        mask = _dense(mask)
    return cut_queries(module, mask, tokens, state)


def cut_queries(module: nn.Module, mask: object, tokens: int, state: ParallelState) -> Any:
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
    """Bool [B, 1, S', X] of a mask whose padding is that of the keys."""
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
