"""Document boundaries in the forms that kernels and collators have for them, turned into positions at the top.

    cu_seq_lens_q, cu_seq_lens_k   where documents begin in the flattened rows, and where the last ends; or cu_seqlens
    seq_idx                        [B, S], the number of each token's document
    attention_mask                 [B, S] of integers: 1, 1, 2, 2, 2, 0 are two documents and padding

Below, positions alone tell documents apart. Shapes: B rows; S tokens of a full row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.host import on_host, with_values

_EDGES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
_NUMBERS = "seq_idx"
_OPTIONS = (*_EDGES, _NUMBERS, "max_length_q", "max_length_k")


def attach_boundaries(model: nn.Module) -> Callable[[], None]:
    """Turn other forms of boundaries into `position_ids` before anything else sees a call of the model.

    A mask of integers of which the host does not know the values is read here, for all that ask after this; and
    one number more where the mask tells of documents and positions are given as well.

    Returns:
        A function that removes this.
    """
    parameters = inspect.signature(model.forward).parameters
    names = list(parameters)
    takes = "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    takes = takes and not hf.is_encoder_decoder(model)

    def translate(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        given = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs.get("input_ids")
        if not isinstance(given, Tensor):
            return None
        mask: Any = inputs.get("attention_mask")
        counts = isinstance(mask, Tensor) and _counts(mask, given)
        if counts:
            inputs["attention_mask"] = mask = with_values(mask, on_host(mask))
        begins, told_by = find_boundaries(inputs, given)
        if not told_by:
            return (args, kwargs | {"attention_mask": mask}) if counts and "attention_mask" in kwargs else None
        if not takes:
            raise UnsupportedError(
                f"{told_by} tells of packed documents, but {type(module).__name__} takes no `position_ids`, by which "
                "they are kept apart: give it one document a row."
            )
        real = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        positions = inputs.get("position_ids")
        if positions is None:
            _check_text(module, inputs, told_by)
            inputs["position_ids"] = count_from(begins)
        else:
            _check_agreement(told_by, begins, positions, real)
        if real is not None:
            inputs["attention_mask"] = real.to(mask.dtype)
        return (), {name: value for name, value in inputs.items() if name not in _OPTIONS}

    return model.register_forward_pre_hook(translate, with_kwargs=True, prepend=True).remove


def find_boundaries(inputs: Mapping[str, Any], given: Tensor) -> tuple[Tensor, str]:
    """Which tokens begin a document, bool [B, S], and the name of the input that tells; "" if none does.

    Args:
        given: ids [B, S] or embeddings [B, S, H].

    Raises:
        ValueError: edges that do not end with the rows, or differ for queries and keys; numbers of another shape.
    """
    begins = torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
    begins[:, 0] = True
    told_by = []
    edges = {name: inputs[name] for name in _EDGES if inputs.get(name) is not None}
    if edges:
        _mark_edges(begins, edges)
        told_by.append(f"`{next(iter(edges))}`")
    numbers, mask = inputs.get(_NUMBERS), inputs.get("attention_mask")
    if numbers is not None:
        if numbers.shape != given.shape[:2]:
            raise ValueError(
                f"`{_NUMBERS}` {list(numbers.shape)} must have one number for each token of the rows "
                f"{list(given.shape[:2])}."
            )
        begins[:, 1:] |= numbers.diff(dim=1) != 0
        told_by.append(f"`{_NUMBERS}`")
    if isinstance(mask, Tensor) and _counts(mask, given) and bool((on_host(mask) > 1).any()):
        begins[:, 1:] |= mask.diff(dim=1) != 0
        told_by.append("`attention_mask` with numbers above 1")
    return begins, " and ".join(told_by)


def _counts(mask: Tensor, given: Tensor) -> bool:
    """Whether a mask may number the documents."""
    return mask.shape == given.shape[:2] and not mask.is_floating_point() and mask.dtype != torch.bool


def _mark_edges(begins: Tensor, edges: Mapping[str, Any]) -> None:
    rows = [torch.as_tensor(each).flatten().tolist() for each in edges.values()]
    total = begins.numel()
    if any(row != rows[0] for row in rows) or rows[0][:1] != [0] or rows[0][-1] != total or sorted(rows[0]) != rows[0]:
        raise ValueError(
            f"{' and '.join(f'`{name}`' for name in edges)} ({', '.join(map(str, rows))}) must rise from 0 to the "
            f"number of tokens ({total}), alike for queries and keys: or leave them out and give `position_ids` that "
            "begin at 0 with each document."
        )
    begins.view(-1)[[edge for edge in rows[0] if edge < total]] = True


def count_from(begins: Tensor) -> Tensor:
    """Positions that count from 0 in each document [B, S], from where they begin."""
    index = torch.arange(begins.shape[1], device=begins.device)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def _check_text(model: nn.Module, inputs: Mapping[str, Any], told_by: str) -> None:
    items = [name for name in inputs if name.endswith("_grid_thw") and inputs[name] is not None]
    if items and "mrope_section" in str(getattr(hf.text_config(model), "rope_parameters", None)):
        raise UnsupportedError(
            f"{told_by} tells of packed documents, and beside `{items[0]}` positions are those of each document: "
            "give `position_ids` [4, rows, tokens], as OmniDataCollatorWithPacking(model_config=...) makes them."
        )


def _check_agreement(told_by: str, begins: Tensor, positions: Tensor, real: Tensor | None) -> None:
    """Raises ValueError where positions [.., S] tell of other documents than `begins`, padding aside."""
    counted = positions[0] if positions.dim() == 3 else positions
    others = (counted.diff(dim=-1) != 1).expand(len(begins), -1) != begins[:, 1:]
    if positions.dim() == 3 and len(positions) != 4:
        others = begins[:, 1:]
    if real is not None:
        others = others & real[:, 1:] & real[:, :-1]
    if bool(others.any()):
        raise ValueError(
            f"{told_by} and `position_ids` tell of other documents: leave one of them out. Positions must begin anew "
            "with each document (of mRoPE the first of [4, rows, tokens])."
        )
