"""Calls of a prepared model, before anything else sees them: document boundaries become positions, then checks.

Boundaries come in the forms that kernels and collators have for them:

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
from transformers import PreTrainedModel

from hf_veomni import hf
from hf_veomni.attention.documents import find_breaks
from hf_veomni.context import is_generating
from hf_veomni.errors import UnsupportedError
from hf_veomni.host import on_host, with_values
from hf_veomni.mesh import ParallelState

_EDGES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
_NUMBERS = "seq_idx"
_OPTIONS = (*_EDGES, _NUMBERS, "max_length_q", "max_length_k")


class _Calls:
    """The hook at the top of one prepared model."""

    def __init__(self, model: PreTrainedModel, state: ParallelState, reasons: Mapping[str, str]) -> None:
        self.state, self.reasons = state, reasons
        parameters = inspect.signature(model.forward).parameters
        self.names = list(parameters)
        takes = "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.takes_positions = takes and not hf.is_encoder_decoder(model)
        self.known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.checked: set[bool] = set()  # whether parameters were looked at in training, in evaluation: milliseconds

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        given = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs.get("input_ids")
        changed = self._translate(module, inputs, given) if isinstance(given, Tensor) else None
        if self.state.world_size > 1 and module.training not in self.checked:
            _check_unchanged(module, self.known)
            check_no_gradient_hooks(module)
            if module.training:
                _check_layerdrop(module)
            self.checked.add(module.training)
        inputs = inputs if changed is None else changed
        if "labels" not in self.reasons:  # other heads have labels of other shapes
            _check_labels(inputs, decodes="decoder_input_ids" in self.names)
        cached = hf.uses_cache(inputs)
        self._check_packed(inputs, cached)
        if self.state.sp_size > 1 and not is_generating(module):
            self._check_cut(module, inputs, cached)
        return None if changed is None else ((), changed)

    def _translate(self, module: nn.Module, inputs: dict[str, Any], given: Tensor) -> dict[str, Any] | None:
        """The inputs with `position_ids` in place of other forms of boundaries; None where nothing changes."""
        mask: Any = inputs.get("attention_mask")
        counts = isinstance(mask, Tensor) and _counts(mask, given)
        if counts:
            inputs["attention_mask"] = mask = with_values(mask, on_host(mask))
        begins, told_by = find_boundaries(inputs, given)
        if not told_by:
            return inputs if counts else None
        if not self.takes_positions:
            raise UnsupportedError(
                f"{told_by} marks packed documents, but {type(module).__name__} takes no `position_ids`, by which "
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
        return {name: value for name, value in inputs.items() if name not in _OPTIONS}

    def _check_packed(self, inputs: Mapping[str, Any], cached: bool) -> None:
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if "packed" in self.reasons and mask is None and _is_packed(positions):
            raise UnsupportedError(f"Packed sequences would not be kept apart: {self.reasons['packed']}")
        if cached and _is_full(mask) and _is_packed(positions):
            raise UnsupportedError(
                "Packed documents would see each other with `use_cache=True` or `past_key_values`: leave the cache "
                "out, or run the documents one by one."
            )

    def _check_cut(self, module: nn.Module, inputs: Mapping[str, Any], cached: bool) -> None:
        """Raises UnsupportedError for what has no answer where every rank has a slice of the row."""
        reasons, keep = self.reasons, inputs.get("logits_to_keep", 0)
        if "router" in reasons and not inputs.get("fused_lm_head"):  # of TRL, which computes it itself
            _check_router_loss(module, inputs, reasons["router"])
        if "labels" in reasons and "full" not in reasons and inputs.get("labels") is not None:
            raise UnsupportedError(f"No loss over a cut row: {reasons['labels']}")
        if cached and inputs.get("labels") is not None:
            raise UnsupportedError(
                "`labels` with `use_cache=True` or `past_key_values` is not available at sp_size > 1: every "
                "rank runs the full row then. Leave the cache out to get a loss."
            )
        if not cached and (isinstance(keep, Tensor) or keep != 0):
            raise UnsupportedError(
                f"`logits_to_keep` ({keep!r}) counts from the end of the full row, which no rank of an SP group "
                "holds: leave it out and slice what `gather_sequence` returns."
            )


def attach_calls(model: PreTrainedModel, state: ParallelState, reasons: Mapping[str, str]) -> Callable[[], None]:
    """Turn other forms of boundaries into `position_ids`, and refuse calls that would be answered wrongly.

    A mask of integers of which the host does not know the values is read here, for all that ask after this; and
    one number more where the mask tells of documents and positions are given as well.

    Args:
        reasons: why this model takes no "packed" rows, or computes no loss from "labels" or for its "router" under
            its plan; "full" where its head works on full rows, so that it computes its own loss.

    Returns:
        A function that removes this.
    """
    calls = _Calls(model, state, reasons)
    return model.register_forward_pre_hook(calls.enter, with_kwargs=True, prepend=True).remove


def find_boundaries(inputs: Mapping[str, Any], given: Tensor) -> tuple[Tensor, str]:
    """Which tokens begin a document, bool [B, S], and the name of the input that tells; "" if none does.

    Args:
        given: ids [B, S] or embeddings [B, S, C].

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
            f"{told_by} marks packed documents, and beside `{items[0]}` positions are those of each document: "
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
            f"{told_by} and `position_ids` mark different documents: leave one of them out. Positions must begin anew "
            "with each document (of mRoPE the first of [4, rows, tokens])."
        )


def _check_labels(inputs: Mapping[str, Any], decodes: bool) -> None:
    """`decodes`: whether the labels are those of a decoder's row, beside which an encoder has one of its own."""
    ids, embeds = ("decoder_input_ids", "decoder_inputs_embeds") if decodes else ("input_ids", "inputs_embeds")
    labels, given = inputs.get("labels"), inputs.get(ids)
    given = inputs.get(embeds) if given is None else given
    if isinstance(labels, Tensor) and isinstance(given, Tensor) and labels.shape[:2] != given.shape[:2]:
        raise ValueError(
            f"`labels` {tuple(labels.shape)} must have one entry for each token of the row {tuple(given.shape[:2])}: "
            "give both at full length, unshifted; they are shifted and cut inside the model."
        )


def _is_packed(positions: object) -> bool:
    return isinstance(positions, Tensor) and bool(find_breaks(positions).any())


def _is_full(mask: object) -> bool:
    return mask is None or (isinstance(mask, Tensor) and bool(on_host(mask).all()))


def _check_router_loss(model: nn.Module, inputs: Mapping[str, Any], reason: str) -> None:
    wanted = inputs.get("output_router_logits")
    if wanted is None:
        wanted = getattr(hf.text_config(model), "output_router_logits", False)
    if wanted and inputs.get("labels") is not None:
        raise UnsupportedError(
            "`output_router_logits` adds a load-balancing loss of this rank's tokens alone at sp_size > 1, which is "
            f"not that of the row ({reason}): set it to False in the config, or use sp_size=1."
        )


def _check_unchanged(model: nn.Module, known: set[str]) -> None:
    new = next((name for name, _ in model.named_parameters() if name not in known), None)
    if new is not None:
        raise UnsupportedError(
            f"Parameter '{new}' came after `prepare_omni`: apply PEFT first and shard the model with its adapters, "
            "which otherwise are neither equal on the ranks nor reduced over them."
        )


def check_no_gradient_hooks(model: nn.Module) -> None:
    """Raise UnsupportedError for hooks on gradients of parameters, which would not be called, or see a part."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UnsupportedError(
                f"Parameter '{name}' has a hook on its gradient (`register_hook`, which peft's OSF uses, too), and "
                "over several ranks FSDP2 makes the gradients of shards past such hooks: remove it and change "
                "`p.grad` after the backward, of which each rank has its shard, or use one rank."
            )


def _check_layerdrop(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(drop := getattr(module, "layerdrop", 0), float) and drop > 0:
            raise UnsupportedError(
                f"`layerdrop` ({drop}) of `{name}` lets each rank skip different layers, and then the ranks "
                "deadlock: set this attribute to 0, or load the model with the config's `layerdrop`, "
                "`encoder_layerdrop` and `decoder_layerdrop` at 0."
            )
