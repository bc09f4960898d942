"""What a layer is given besides hidden states: cut what has an entry for each token.

    [B, S', W]       features of its own for each token (Gemma 4's per-layer inputs)
    [B, 1, S, 1]     a factor for each token (Mllama's rows that see no image; Beam's scale of queries, of one row)
    [B, S']          which tokens are audio clips, of those that a layer treats apart (Higgs Audio); ids, by which
                     experts are chosen (DeepSeek-V4)

Masks, biases and the states of another sequence stay unsharded. Shapes: S tokens of a row, S' with padding.
"""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_veomni.context import Row
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.backbone import own_names
from hf_veomni.sequence.shard import shard_sequence

_FULL = re.compile(r"attention_mask|causal_mask|bias|encoder|cross_|key_value|position|relative|past|cache")


def cut_call(layer: nn.Module, args: tuple, kwargs: dict, row: Row, state: ParallelState) -> tuple[tuple, dict] | None:
    """Arguments of a layer with this rank's slice of what is as long as the row; None: they stay as they are.

    Args:
        row: `cut` is set once a layer has got its slice.

    Raises:
        UnsupportedError: the first layer is not given [rows, tokens, width].
    """
    inputs = {**dict(zip(_parameters(type(layer)), args, strict=False)), **kwargs}
    name = next(iter(inputs))
    hidden = inputs[name]
    dim = 2 if hasattr(layer, "altup") else 1  # Gemma 3n has several streams of rows, others of each token
    if not row.cut and (hidden.dim() not in (3, 4) or hidden.shape[dim] != row.padded):
        kind = type(layer).__name__.removeprefix("FSDP")
        raise UnsupportedError(
            f"{kind} takes hidden states of shape {tuple(hidden.shape)}, not [rows, {row.padded}, ..., width], so "
            "this model cannot be cut along its sequence: use sp_size=1."
        )
    num_rows = hidden.shape[dim - 1]
    looks_up = any(_reads_positions(module) for module in layer.modules())
    changed = {k: v for k, x in inputs.items() if k != name and (v := _cut(k, x, num_rows, row, state)) is not x}
    positions = inputs.get("position_ids")
    if looks_up and isinstance(positions, Tensor) and positions.shape[-1] == row.padded:
        changed["position_ids"] = shard_sequence(positions, positions.dim() - 1, state)
    if not row.cut or hidden.shape[dim] == row.padded:
        changed[name] = shard_sequence(hidden, dim, state)
    row.cut = True
    if not changed:
        return None
    names = _parameters(type(layer))[: len(args)]
    positional = tuple(changed.pop(n, x) for n, x in zip(names, args, strict=False)) + args[len(names) :]
    return positional, {**kwargs, **changed}


def _cut(name: str, value: Any, rows: int, row: Row, state: ParallelState) -> Any:
    if not isinstance(value, Tensor) or _FULL.search(name) or not value.dim() or value.shape[0] not in (1, rows):
        return value
    if value.dim() == 4 and value.shape[1] == value.shape[3] == 1 and row.length <= value.shape[2] <= row.padded:
        return shard_sequence(F.pad(value, (0, 0, 0, row.padded - value.shape[2])), 2, state)
    if value.shape[0] != rows:
        return value
    if value.dim() == 2 and (value.dtype == torch.bool or name == "input_ids") and value.shape[1] == row.padded:
        return shard_sequence(value, 1, state)
    if value.dim() == 3 and value.shape[1] == row.padded:
        return shard_sequence(value, 1, state)
    return value


def _reads_positions(module: nn.Module) -> bool:
    """Whether positions are those of the tokens that a layer holds: GPT-J's tables of rope, Ministral's scale."""
    return hasattr(module, "embed_positions") or "get_llama_4_attn_scale" in own_names(type(module))


@lru_cache(maxsize=256)
def _parameters(owner: type[nn.Module]) -> list[str]:
    return list(inspect.signature(owner.forward).parameters)[1:]
