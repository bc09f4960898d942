"""Attentions that never ask AttentionInterface, patched one by one where a small patch serves.

    `_attn(query, key, value, mask)`    a method of GPT-J, GPT-Neo, CodeGen and others: exchanged around it
    `alibi.baddbmm`                     Bloom: the forward again, with this rank's heads of the bias

Shapes: B rows; S', s tokens of the filled-up row and of this rank; H, h heads of the model and of this rank; D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.ulysses import head_layout, heads_to_sequence, sequence_to_heads

_CORE = "_attn"
_CORE_NAMES = (["query", "key", "value"], ["q", "k", "v"])


_BERT_INPUTS = {
    "self", "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "past_key_values",
    "output_attentions", "cache_position", "head_mask", "sinusoidal_pos", "kwargs",
}  # fmt: skip


def has_patch(module: nn.Module) -> bool:
    """Whether an attention that does not ask the interface has a patch here."""
    if hf.uses_attention_interface(module):
        return False
    return _is_core(type(module)) or _is_bert(module) or _is_bloom(module)


def _is_core(owner: type) -> bool:
    core = getattr(owner, _CORE, None)
    return inspect.isfunction(core) and list(inspect.signature(core).parameters)[1:4] in _CORE_NAMES


def _is_bert(module: nn.Module) -> bool:
    """BERT's old self-attention: three projections, heads of one width, nothing else that weighs."""
    parts = {name for name, _ in module.named_children()}
    sizes = ("num_attention_heads", "attention_head_size")
    if set(inspect.signature(type(module).forward).parameters) - _BERT_INPUTS:
        return False
    return parts == {"query", "key", "value", "dropout"} and all(hasattr(module, name) for name in sizes)


def _is_bloom(module: nn.Module) -> bool:
    return hasattr(module, "inv_norm_factor") and hasattr(module, "query_key_value") and hasattr(module, "_reshape")


class PatchHandle:
    """Takes the patch of one module off again."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def remove(self) -> None:
        if isinstance(vars(self.module).get(self.name), partial):
            del vars(self.module)[self.name]


def attach_patch(module: nn.Module, state: ParallelState, is_cut: Callable[[], bool]) -> PatchHandle:
    """Have an attention exchange tokens for heads where the running forward is cut; `has_patch` must be true of it."""
    name, patch = (_CORE, _core) if _is_core(type(module)) else ("forward", _bert if _is_bert(module) else _bloom)
    vars(module)[name] = partial(patch, module, type(module), state, is_cut)
    return PatchHandle(module, name)


def _exchanged(
    state: ParallelState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor, slice], Tensor],
) -> Tensor:
    """`attend` on [B, h, S', D] of this rank's heads, given which; local [B, H, s, D] in, [B, s, H, D] out."""
    group = state.sp_group
    assert group is not None
    layout = head_layout(query.shape[1], key.shape[1], dist.get_world_size(group))
    first, last = layout.query[state.sp_rank]
    query, key, value = sequence_to_heads(query, key, value, layout, group, state.sp_rank)
    out = attend(query, key, value, slice(first, last))
    return heads_to_sequence(out.transpose(1, 2), layout, group, state.sp_rank)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask


def _core(
    module: nn.Module,
    owner: Any,
    state: ParallelState,
    is_cut: Callable[[], bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    original = getattr(owner, _CORE)
    if not is_cut():
        return original(module, query, key, value, *args, **kwargs)
    flipped = list(inspect.signature(original).parameters)[1] == "q"  # GPT's first keeps keys as [B, H, D, s]
    found: list[Any] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> Tensor:
        found.append(original(module, query, key.transpose(2, 3) if flipped else key, value, *args, **kwargs))
        return found[0][0]

    out = _exchanged(state, query, key.transpose(2, 3) if flipped else key, value, attend).transpose(1, 2)
    return type(found[0])([out, *([None] * (len(found[0]) - 1))])


def _bert(
    module: Any,
    owner: Any,
    state: ParallelState,
    is_cut: Callable[[], bool],
    hidden: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    names = list(inspect.signature(owner.forward).parameters)[2:]
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    if not is_cut():
        return owner.forward(module, hidden, *args, **kwargs)
    if any(isinstance(inputs.get(n), Tensor) for n in ("encoder_hidden_states", "past_key_values", "head_mask")):
        raise ValueError(f"{type(module).__name__} takes no states of another sequence under sequence parallelism.")
    heads, width = module.num_attention_heads, module.attention_head_size

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, width)).transpose(1, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor, mine: slice) -> Tensor:
        angles = inputs.get("sinusoidal_pos")  # RoFormer's, of the full row
        if angles is not None and module.rotary_value:
            query, key, value = module.apply_rotary_position_embeddings(angles, query, key, value)
        elif angles is not None:
            query, key = module.apply_rotary_position_embeddings(angles, query, key)
        scores = query @ key.transpose(-1, -2) / width**0.5
        return module.dropout(_masked(scores, inputs.get("attention_mask")).softmax(-1)) @ value

    parts = (split(module.query(hidden)), split(module.key(hidden)), split(module.value(hidden)))
    return _exchanged(state, *parts, attend).flatten(2), None


def _bloom(
    module: Any,
    owner: Any,
    state: ParallelState,
    is_cut: Callable[[], bool],
    hidden: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    if not is_cut():
        return owner.forward(module, hidden, residual, alibi, attention_mask, **kwargs)
    bias = alibi.view(hidden.shape[0], module.num_heads, *alibi.shape[1:])  # [B, H, 1, S']

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> Tensor:
        scores = bias[:, heads] + query @ key.transpose(-1, -2) * module.inv_norm_factor
        scores = _masked(scores, attention_mask)
        return module.attention_dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype)) @ value

    query, key, value = module._reshape(module.query_key_value(hidden))
    out = module.dense(_exchanged(state, query, key, value, attend).flatten(2))
    return residual + F.dropout(out, p=module.hidden_dropout, training=module.training), None
