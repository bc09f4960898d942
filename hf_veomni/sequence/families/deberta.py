"""DeBERTa's attention on this rank's heads: its own forward, on an object that has no others.

Its biases come from relative positions, content and heads together, so they cannot be made beforehand; but no head
looks at another, and the forward reads how many there are from the module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.exchange import exchanged


def is_deberta(module: nn.Module) -> bool:
    """DeBERTa's disentangled attention, of either kind, but not with talking heads."""
    names = {name for name, _ in module.named_children()}
    kinds = {"in_proj"}, {"query_proj", "key_proj", "value_proj"}
    return hasattr(module, "pos_att_type") and any(kind <= names for kind in kinds) and "head_logits_proj" not in names


class _Heads:
    """An attention module as its own forward would see it if it had this rank's heads only, and the full row."""

    def __init__(self, module: nn.Module, owner: type, tokens: dict[str, Tensor], heads: slice, width: int) -> None:
        self._module, self._owner, self._tokens = module, owner, tokens
        self._columns = slice(heads.start * width, heads.stop * width)
        self.num_attention_heads = heads.stop - heads.start

    def __getattr__(self, name: str) -> Any:
        function = inspect.getattr_static(self._owner, name, None)
        if inspect.isfunction(function):
            return partial(function, self)
        found = getattr(self._module, name)
        if name in ("q_bias", "v_bias"):
            return found[self._columns]
        return (
            partial(self._project, name, found) if isinstance(found, nn.Module) and name.endswith("_proj") else found
        )

    def _project(self, name: str, projection: nn.Module, states: Tensor) -> Tensor:
        """Of the tokens what was exchanged, of relative positions this rank's heads."""
        if states is self._tokens["states"]:
            return self._tokens[name]
        return projection(states)[..., self._columns]


def deberta_forward(
    module: Any,
    owner: Any,
    state: ParallelState,
    is_cut: Callable[[], bool],
    hidden_states: Tensor,
    *args: Any,
    **kw: Any,
) -> Any:
    names = list(inspect.signature(owner.forward).parameters)[2:]
    inputs = {**dict(zip(names, args, strict=False)), **kw}
    if not is_cut():
        return owner.forward(module, hidden_states, *args, **kw)
    if inputs.get("query_states") is not None:
        raise UnsupportedError(
            f"{type(module).__name__} takes no queries of another sequence under sequence parallelism."
        )
    width = module.attention_head_size
    fused = hasattr(module, "in_proj")  # of each head its query, key and value
    projections = ("in_proj",) if fused else ("query_proj", "key_proj", "value_proj")
    parts = [getattr(module, name)(hidden_states) for name in projections]
    parts = [x.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2) for x in parts]
    parts = list(parts[0].chunk(3, dim=-1)) if fused else parts

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> Tensor:
        rows = [torch.cat([query, key, value], dim=-1)] if fused else [query, key, value]
        tokens = {"states": hidden_states}
        tokens |= {name: x.transpose(1, 2).flatten(2) for name, x in zip(projections, rows, strict=True)}
        out = owner.forward(_Heads(module, owner, tokens, heads, width), hidden_states, **inputs)[0]
        return out.unflatten(-1, (-1, width)).transpose(1, 2)

    return exchanged(state, attend, *parts).flatten(2), None
