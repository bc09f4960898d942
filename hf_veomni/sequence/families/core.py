"""Attentions that never ask AttentionInterface, patched one by one where a small patch serves.

    `_attn(query, key, value, mask)`    a method of GPT-J, GPT-Neo, CodeGen and others: exchanged around it
    the forward again, with this rank's heads of the bias or of the mask: BERT's old self-attention, MPNet, Bloom, MPT,
    Falcon, and that of XGLM, TrOCR and MVP
    the forward itself, on this rank's heads: DeBERTa (`deberta`)

Shapes: B rows; S', s tokens of the filled-up row and of this rank; H, h heads of the model and of this rank; D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.attention import cut_queries
from hf_veomni.sequence.exchange import exchanged, masked
from hf_veomni.sequence.families.deberta import deberta_forward, is_deberta

_CORE = "_attn"
_CORE_NAMES = (["query", "key", "value"], ["q", "k", "v"])


_BERT_INPUTS = {
    "self", "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", *hf.CACHE_NAMES,
    "output_attentions", "cache_position", "head_mask", "sinusoidal_pos", "kwargs",
    "word_hidden_states", "entity_hidden_states",
}  # fmt: skip
_OF_ENTITIES = {"w2e_query", "e2w_query", "e2e_query"}  # LUKE's, of rows with entities, which are refused

_BART_INPUTS = {
    "self", "hidden_states", "key_value_states", *hf.CACHE_NAMES, "attention_mask", "output_attentions",
    "attn_prompt", "kwargs",
}  # fmt: skip


def has_patch(module: nn.Module) -> bool:
    """Whether an attention that does not ask the interface has a patch here."""
    return not hf.uses_attention_interface(module) and _find_patch(module) is not None


def _find_patch(module: nn.Module) -> tuple[str, Callable[..., Any]] | None:
    """The method that is replaced, and by what."""
    if _is_core(type(module)):
        return _CORE, _core
    forwards: list[tuple[Callable[..., Any], bool]] = [
        (_bert, _is_bert(module)),
        (_bloom, _has(module, "inv_norm_factor", "query_key_value", "_reshape")),
        (_falcon, _has(module, "inv_norm_factor", "query_key_value", "_split_heads", "num_kv_heads")),
        (_mpt, _has(module, "Wqkv", "softmax_scale", "clip_qkv", "n_heads")),
        (_mpnet, _is_mpnet(module)),
        (_bart, _is_bart(module)),
        (deberta_forward, is_deberta(module)),
    ]
    return next((("forward", patch) for patch, fits in forwards if fits), None)


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_core(owner: type) -> bool:
    core = getattr(owner, _CORE, None)
    return inspect.isfunction(core) and list(inspect.signature(core).parameters)[1:4] in _CORE_NAMES


def _is_bert(module: nn.Module) -> bool:
    """BERT's old self-attention: three projections, heads of one width, nothing else that weighs."""
    sizes = ("num_attention_heads", "attention_head_size")
    if set(inspect.signature(type(module).forward).parameters) - _BERT_INPUTS:
        return False
    # YOSO and MRA look the same, and approximate the softmax.
    plain = "softmax" in hf.code_names(module)
    return plain and _children(module) - _OF_ENTITIES == {"query", "key", "value", "dropout"} and _has(module, *sizes)


def _is_mpnet(module: nn.Module) -> bool:
    inputs = inspect.signature(type(module).forward).parameters
    return _children(module) == {"q", "k", "v", "o", "dropout"} and "position_bias" in inputs


def _is_bart(module: nn.Module) -> bool:
    """BART's attention of old, with scores by `bmm`."""
    if set(inspect.signature(type(module).forward).parameters) - _BART_INPUTS:
        return False
    parts = {"q_proj", "k_proj", "v_proj", "out_proj"}
    return _children(module) == parts and _has(module, "num_heads", "head_dim", "scaling", "dropout")


class PatchHandle:
    """Takes the patch of one module off again."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def remove(self) -> None:
        if isinstance(vars(self.module).get(self.name), partial):
            del vars(self.module)[self.name]


def attach_patch(module: nn.Module, state: ParallelState, is_cut: Callable[[], bool]) -> PatchHandle:
    """Have an attention exchange tokens for heads where the running forward is cut; `has_patch` must be true of it."""
    found = _find_patch(module)
    assert found is not None
    name, patch = found
    vars(module)[name] = partial(patch, module, type(module), state, is_cut)
    return PatchHandle(module, name)


def _core(
    module: nn.Module,
    owner: object,
    state: ParallelState,
    is_cut: Callable[[], bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: object,
    **kwargs: object,
) -> Any:
    original = getattr(owner, _CORE)
    if not is_cut():
        return original(module, query, key, value, *args, **kwargs)
    flipped = list(inspect.signature(original).parameters)[1] == "q"  # GPT's first keeps keys as [B, H, D, s]
    found: list[Any] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> Tensor:
        found.append(original(module, query, key.transpose(2, 3) if flipped else key, value, *args, **kwargs))
        return found[0][0]

    out = exchanged(state, attend, query, key.transpose(2, 3) if flipped else key, value).transpose(1, 2)
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
    others = ("encoder_hidden_states", "entity_hidden_states", *hf.CACHE_NAMES, "head_mask")
    if any(isinstance(inputs.get(name), Tensor) for name in others):
        raise UnsupportedError(
            f"{type(module).__name__} takes no states of another sequence under sequence parallelism."
        )
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
        return module.dropout(masked(scores, inputs.get("attention_mask")).softmax(-1)) @ value

    parts = (split(module.query(hidden)), split(module.key(hidden)), split(module.value(hidden)))
    return exchanged(state, attend, *parts).flatten(2), None


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
        scores = masked(scores, attention_mask)
        return module.attention_dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype)) @ value

    query, key, value = module._reshape(module.query_key_value(hidden))
    out = module.dense(exchanged(state, attend, query, key, value).flatten(2))
    return residual + F.dropout(out, p=module.hidden_dropout, training=module.training), None


def _mpt(
    module: Any,
    owner: Any,
    state: ParallelState,
    is_cut: Callable[[], bool],
    hidden: Tensor,
    position_bias: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not is_cut():
        return owner.forward(module, hidden, position_bias, *args, **kwargs)
    names = list(inspect.signature(owner.forward).parameters)[3:]
    attention_mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
    mixed = module.Wqkv(hidden)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    parts = [x.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for x in mixed.chunk(3, dim=2)]

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> Tensor:
        scores = query @ key.transpose(-1, -2) * module.softmax_scale
        scores = scores + position_bias[heads, :, position_bias.shape[2] - key.shape[2] :]  # [H, 1, longest row]
        if attention_mask is not None:  # True where a token must not look
            scores = scores.masked_fill(attention_mask, torch.finfo(query.dtype).min)
        weights = scores.float().softmax(-1).to(value.dtype)
        return F.dropout(weights, p=module.attn_dropout_p, training=module.training) @ value

    return module.out_proj(exchanged(state, attend, *parts).flatten(2)), None


def _falcon(
    module: Any,
    owner: Any,
    state: ParallelState,
    is_cut: Callable[[], bool],
    hidden: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor,
    *args: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    if not is_cut():
        kwargs["position_embeddings"] = position_embeddings
        return owner.forward(module, hidden, alibi, attention_mask, *args, **kwargs)
    rotate = inspect.unwrap(owner.forward).__globals__["apply_rotary_pos_emb"]
    parts = [x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden))]
    if alibi is None:
        assert position_embeddings is not None
        parts[:2] = rotate(*parts[:2], *position_embeddings)
    fused = module.config._attn_implementation == "sdpa"
    dropout = module.attention_dropout.p if module.training and alibi is not None else 0.0

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> Tensor:
        mask = attention_mask if attention_mask.shape[1] == 1 else attention_mask[:, heads]  # ALiBi has one a head
        if fused:
            key, value = (x.expand(-1, query.shape[1], -1, -1) if x.shape[1] == 1 else x for x in (key, value))
            return F.scaled_dot_product_attention(query, key, value, mask, dropout)
        scores = query @ key.transpose(-1, -2)
        if alibi is not None:
            scores = scores + alibi.view(len(query), module.num_heads, 1, -1)[:, heads]
        weights = masked(scores * module.inv_norm_factor, mask).softmax(-1)
        return F.dropout(weights, p=dropout) @ value

    return module.dense(exchanged(state, attend, *parts).flatten(2)), None


def _mpnet(
    module: Any,
    owner: Any,
    state: ParallelState,
    is_cut: Callable[[], bool],
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not is_cut():
        return owner.forward(module, hidden, attention_mask, position_bias, *args, **kwargs)
    width = module.attention_head_size
    parts = [f(hidden).unflatten(-1, (-1, width)).transpose(1, 2) for f in (module.q, module.k, module.v)]

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> Tensor:
        scores = query @ key.transpose(-1, -2) / width**0.5
        if position_bias is not None:
            scores = scores + position_bias[:, heads]
        return module.dropout(masked(scores, attention_mask).softmax(-1)) @ value

    return (module.o(exchanged(state, attend, *parts).flatten(2)),)


def _bart(
    module: Any,
    owner: Any,
    state: ParallelState,
    is_cut: Callable[[], bool],
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    names = list(inspect.signature(owner.forward).parameters)[2:]
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    if not is_cut():
        return owner.forward(module, hidden_states, *args, **kwargs)
    if any(inputs.get(name) is not None for name in ("attn_prompt", *hf.CACHE_NAMES)):
        raise UnsupportedError(f"{type(module).__name__} takes no prompts and no cache under sequence parallelism.")
    mask = inputs.get("attention_mask")
    if inputs.get("key_value_states") is not None:  # full, and each token looks at them for itself
        inputs["attention_mask"] = cut_queries(module, mask, hidden_states.shape[1], state)
        return owner.forward(module, hidden_states, **inputs)
    query = module.q_proj(hidden_states) * module.scaling
    parts = [query, module.k_proj(hidden_states), module.v_proj(hidden_states)]
    parts = [x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in parts]

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> Tensor:
        scores = masked(query @ key.transpose(-1, -2), mask)
        weights = scores.clamp(min=torch.finfo(scores.dtype).min).softmax(-1)
        return F.dropout(weights, p=module.dropout, training=module.training) @ value

    return module.out_proj(exchanged(state, attend, *parts).flatten(2)), None
