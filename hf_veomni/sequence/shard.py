"""Pad, slice and gather what has a sequence axis: of the backbone's input, and of what a layer is given.

A layer gets hidden states, and may get beside them

    [B, S', W]       features of its own for each token (Gemma 4's per-layer inputs)
    [B, 1, S, 1]     a factor for each token (Mllama's rows that see no image; Beam's scale of queries, of one row)
    [B, S']          which tokens are audio clips, of those that a layer treats apart (Higgs Audio); ids, by which
                     experts are chosen (DeepSeek-V4)

Masks, biases and the states of another sequence stay unsharded.

Shapes: B rows; S tokens of the row as given; S' = S padded to a multiple of sp; s = S'/sp tokens of this rank.
"""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hf_veomni.attention.mask import MaskSpec
from hf_veomni.comm.gather import gather_shards
from hf_veomni.context import Row, current
from hf_veomni.errors import UnsupportedError
from hf_veomni.host import apply
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.backbone import own_names


def shard_sequence(x: Tensor, dim: int, state: ParallelState) -> Tensor:
    """This rank's slice of a tensor that is the same on all ranks of the SP group.

    Args:
        x: full tensor, S' along `dim`, a multiple of sp_size.

    Returns:
        Local tensor, s along `dim`: a copy, so that the full tensor can be freed.
    """
    size = x.shape[dim]
    assert size % state.sp_size == 0, (x.shape, dim, state.sp_size)
    part = size // state.sp_size
    return x.narrow(dim, state.sp_rank * part, part).clone()


def check_same_rows(given: Tensor, state: ParallelState) -> None:
    """Check that the ranks of the SP group were handed the same rows: ids [B, S], or embeddings, of which the shape.

    Collective: one all-gather of three integers over the SP group, and a read back.

    Raises:
        ValueError: on every rank of the group alike.
    """
    weights = torch.arange(1, given.shape[1] + 1, device=given.device)
    content = (given.long() * weights).sum() if given.dim() == 2 else torch.zeros((), dtype=torch.long)
    mine = torch.tensor([given.shape[0], given.shape[1], 0], device=state.device)
    mine[2] = content
    found = [torch.empty_like(mine) for _ in range(state.sp_size)]
    dist.all_gather(found, mine, group=state.sp_group)
    rows = [x.tolist() for x in found]
    if any(row != rows[0] for row in rows):
        shapes = [tuple(row[:2]) for row in rows]
        raise ValueError(
            f"The ranks of an SP group were given different rows (shapes {shapes}): every one of them takes the same "
            "full row and cuts it inside the model. Read batches by `get_parallel_state(model).dp_rank` of `dp_size`."
        )


def gather_rows(x: Tensor, length: int, state: ParallelState) -> Tensor:
    """Full rows [B, S, ...] from the slices [B, s, ...] of the SP group, without the padding.

    Collective: one all-gather over the SP group; its backward is a reduce-scatter (sum).
    """
    if state.sp_group is not None:
        x = gather_shards(x, state.sp_group, dim=1)
    return x.narrow(1, 0, length)


def pad_positions(position_ids: Tensor, extra: int) -> Tensor:
    """Lengthen [..., S] by `extra` positions that count from 0: a dummy document of its own."""
    tail = position_ids.new_ones(extra).cumsum(0, dtype=position_ids.dtype) - 1
    return torch.cat([position_ids, tail.expand(*position_ids.shape[:-1], extra)], dim=-1)


_HANDLED = {"input_ids", "inputs_embeds", "position_ids", "attention_mask"}


def pad_inputs(inputs: dict[str, Any], extra: int, pad_token_id: int) -> dict[str, Any]:
    """Lengthen everything in a backbone's inputs that has a sequence axis by `extra` tokens.

    Args:
        inputs: `input_ids` [B, S] or `inputs_embeds` [B, S, C]; `position_ids` [..., S]; `attention_mask` [B, S].

    Raises:
        UnsupportedError: an attention mask that is already expanded to [B, 1, S, S] or per layer type.
    """
    if not extra:
        return inputs
    padded = dict(inputs)
    mask = inputs.get("attention_mask")
    if isinstance(mask, MaskSpec):
        padded["attention_mask"] = mask.lengthened(extra)
    elif isinstance(mask, dict) and all(x is None or isinstance(x, MaskSpec) for x in mask.values()):
        padded["attention_mask"] = {k: x if x is None else x.lengthened(extra) for k, x in mask.items()}
    elif mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise UnsupportedError(
                f"`attention_mask` ({type(mask).__name__}) is expanded already, so it cannot take {extra} more: "
                "pass a [batch, tokens] mask or none, or make the row a multiple of sp_size."
            )
        padded["attention_mask"] = apply(F.pad, mask, (0, extra))
    if inputs.get("input_ids") is not None:
        padded["input_ids"] = F.pad(inputs["input_ids"], (0, extra), value=pad_token_id)
    if inputs.get("inputs_embeds") is not None:
        padded["inputs_embeds"] = F.pad(inputs["inputs_embeds"], (0, 0, 0, extra))
    padded["position_ids"] = apply(pad_positions, inputs["position_ids"], extra)
    length = inputs["position_ids"].shape[-1]
    for name, value in inputs.items():  # token types, boxes, languages
        if name in _HANDLED or name.startswith(("encoder_", "cross_", "labels")) or not isinstance(value, Tensor):
            continue
        if name.startswith("per_layer") and value.dim() == 4 and value.shape[1] == length:  # Gemma 4
            padded[name] = F.pad(value, (0, 0, 0, 0, 0, extra))
        elif value.dim() in (2, 3) and value.shape[1] == length and not value.is_floating_point():
            padded[name] = F.pad(value, (0, 0) * (value.dim() - 2) + (0, extra))
    return padded


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


class SliceHooks:
    """Hooks that cut what a backbone makes at full length, for its layers."""

    def __init__(self, owner: object, state: ParallelState) -> None:
        """`owner`: of the rows (`context`) that are to be cut."""
        self.owner, self.state = owner, state

    def _row(self) -> Row | None:
        row = current().row
        return None if row is None or row.full or row.owner is not self.owner else row

    def rope(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After a rotary embedding: its tables [.., S', D] as [.., s, D]."""
        row = self._row()
        if row is None:
            return output
        tables = output if isinstance(output, tuple) else (output,)
        if any(table.shape[-2] != row.padded for table in tables):
            kind, shapes = type(module).__name__, [tuple(table.shape) for table in tables]
            raise UnsupportedError(f"{kind} returned tables of shapes {shapes}, not [..., {row.padded}, width].")
        sliced = tuple(shard_sequence(table, -2, self.state) for table in tables)
        return sliced if isinstance(output, tuple) else sliced[0]

    @torch.compiler.disable
    def layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before a layer: the slice of what is as long as the row."""
        row = self._row()
        return None if row is None else cut_call(layer, args, kwargs, row, self.state)


def _cut(name: str, value: object, rows: int, row: Row, state: ParallelState) -> Any:
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
