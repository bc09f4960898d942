"""Install sequence parallelism and packing on a stock model: its attention, and hooks around the backbone.

    backbone          pre-hook    pads the row, finds the packed documents, switches the cache off
      rotary          post-hook   rope tables [.., S', D] -> [.., s, D]
      layer           pre-hook    hidden states [B, S', C] -> [B, s, C], in the first layer that sees the full row
        attention     mark        the registered attention function exchanges tokens for heads (`ulysses`)
    backbone          post-hook   checks that what comes out is this rank's slice

Embeddings, masks and positions are made at full length by the model's own code, so masks are right by construction.
Module hooks run outside of activation checkpointing (transformers 5.23 checkpoints `forward`, not `__call__`), hence
nothing here runs a second time in the backward; a recomputation has the layers' arguments and the forward's `context`.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.attention.documents import Documents
from hf_veomni.attention.mask_reader import tell_packing, untell_packing
from hf_veomni.attention.registry import attach_user, release, select
from hf_veomni.attention.varlen import VARLEN_NAME, register_varlen_attention
from hf_veomni.context import Call, CheckpointCarrier, Row, current, enter, is_cut, is_generating, leave
from hf_veomni.errors import UnsupportedError
from hf_veomni.host import forget
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.attention import OwnAttention, can_cross, watch_cross
from hf_veomni.sequence.backbone import (
    looks_ahead_by_kernel,
    makes_masks,
    masks_on_demand,
    reads_padding,
    views_as_row,
)
from hf_veomni.sequence.checks import (
    Capabilities,
    Context,
    check_available,
    check_counted,
    check_documents,
    check_mask_given,
    check_masks_above,
    check_slice,
    find_positions,
    prepare_mask,
    refuse_unshared,
    row_documents,
)
from hf_veomni.sequence.dtypes import explain_dtypes
from hf_veomni.sequence.families.bias import attach_bias
from hf_veomni.sequence.families.core import attach_patch, has_patch
from hf_veomni.sequence.families.deepstack import cut_deepstack
from hf_veomni.sequence.gather_points import find_gather_point, map_hidden, pooling_modules, text_encoder
from hf_veomni.sequence.generation import attach_generate, detach_generate
from hf_veomni.sequence.inspect import ShardPoints, check_heads, find_shard_points
from hf_veomni.sequence.mixers.attach import LinearAttachment
from hf_veomni.sequence.mixers.table import Gathered, check_mixer_heads
from hf_veomni.sequence.origin import find_origin
from hf_veomni.sequence.outputs import Outputs
from hf_veomni.sequence.shard import SliceHooks, check_same_rows, gather_rows, pad_inputs, shard_sequence

_attached: WeakSet[SequenceAttachment] = WeakSet()


class SequenceAttachment:
    """Sequence parallelism and packing on one model; `detach` takes all of it off again."""

    def __init__(
        self,
        model: nn.Module,
        state: ParallelState,
        attention: str = "auto",
        full_output: bool = False,
        gathered: Gathered | None = None,
        masks_as_tensors: bool = False,
    ) -> None:
        """Check the model and install. See `attach_sequence`; the last two are what an encoder is told."""
        self.model, self.state = hf.base_model(model), state
        self.name = type(self.model).__name__  # FSDP2 renames the class
        rules = Gathered.of(self.model, state.plan) if gathered is None else gathered
        self.points: ShardPoints = find_shard_points(self.model, rules.modules, rules.names)
        if self.points.attentions:
            check_heads(self.model, state.sp_size)
        check_mixer_heads(self.points.mixers, state.sp_size)
        self.config = hf.text_config(self.model)
        self.gather_point = find_gather_point(self.model, self.points, full_output)
        self._masks_as_tensors = any(map(has_patch, self.points.attentions)) or rules.attend or masks_as_tensors
        self._masks_as_tensors |= reads_padding(self.model)
        self.encoder: SequenceAttachment | None = None
        encoder = text_encoder(self.model, self.points)
        if encoder is not None:
            self.encoder = SequenceAttachment(encoder, state, attention, True, rules, self._masks_as_tensors)
            self._masks_as_tensors |= self.encoder._masks_as_tensors  # they may share a config
        if gathered is None:
            rules.check([*self.points.mixers, *(self.encoder.points.mixers if self.encoder else ())])
        self.outputs = Outputs(state.sp_size)
        self._compared = False  # the rows of the SP group's ranks
        self._handles: list[Any] = []
        self._configs = hf.iterate_configs(self.points.decoder, iter(self.points.attentions))
        self._option = attention
        self._signature = list(inspect.signature(self.points.decoder.forward).parameters)
        self._model_signature = list(inspect.signature(self.model.forward).parameters)
        self._views_as_row = views_as_row(self.points.decoder)
        self._looks_ahead = any(not getattr(m, "is_causal", False) for m in self.points.attentions)
        self._origin = find_origin(self.points.decoder, self.points.layers)
        self._capabilities = Capabilities(
            self.name,
            Context.of(self.config, self._origin),
            self.points,
            makes_masks([self.model, self.model.base_model, self.points.decoder, self.points.container]),
            hf.masks_follow_positions(self.points.decoder),
            self._masks_as_tensors,
            any(getattr(module, "token_dropout", False) for module in self.points.decoder.modules()),
        )
        self._masks_on_demand = masks_on_demand(self.points.decoder)
        self._wants_mask = looks_ahead_by_kernel(self.points.decoder, self.points.attentions)
        self._install()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy of the model has a copy of this, which counts for the copy's configs."""
        vars(self).update(state)
        attach_user(self, self._configs, self._option, self._previous)
        _attached.add(self)

    def _install(self) -> None:
        register_varlen_attention()
        tell_packing()
        replaced = ["sdpa"] if hf.supports_sdpa(self.model) else ["sdpa", "eager"]
        replaced = [] if self._masks_as_tensors else replaced
        self._previous = select(self, self._configs, self._option, replaced, VARLEN_NAME)
        _attached.add(self)
        crossing = [m for m in self.points.attentions if can_cross(m)]
        self._handles += [watch_cross(m) for m in crossing]
        self._crosses = bool(crossing) or any(m.scheme == "gather" for m in self.points.mixers)
        exchanging = crossing if self.state.sp_group is None else self.points.attentions
        self._own_attention = OwnAttention([m for m in exchanging if not has_patch(m)], self.state)
        decoder = self.points.decoder
        if self.model is not decoder:
            self._handles += [
                self.model.register_forward_pre_hook(self._note_cache, with_kwargs=True),
                self.model.register_forward_hook(self._forget_cache, always_call=True),
            ]
        self._handles += [
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            decoder.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        if self.state.sp_size > 1:
            self._handles += [attach_patch(m, self.state, is_cut) for m in self.points.attentions if has_patch(m)]
            self._handles += [attach_bias(m, self.state.sp_size, is_cut) for m in self.points.attentions]
            if self.gather_point is not None and self.gather_point is not decoder:
                self._handles.append(self.gather_point.register_forward_hook(self._gather_output))
            if self._views_as_row:  # the backbone reshapes what its last norm returns as if it were full
                pooling = [decoder.get_submodule("ln_f")]
            else:
                pooling = pooling_modules(self.points, self.gather_point)
            for module in pooling:
                self._handles.append(module.register_forward_pre_hook(self._gather_input, with_kwargs=True))
            attach_generate(self.model)
            slices = SliceHooks(self, self.state)
            self._handles += [m.register_forward_hook(slices.rope) for m in self.points.rotary]
            self._handles += [
                m.register_forward_pre_hook(slices.layer, with_kwargs=True)  # pyright: ignore
                for m in self.points.layers
            ]
        self._checkpointed = [module for module in decoder.modules() if hasattr(module, "gradient_checkpointing")]
        self._linear = None
        if self.points.mixers:
            self._linear = LinearAttachment(decoder, self.points.mixers, self.state)

    def detach(self) -> None:
        """Remove hooks and select the previous attention."""
        if self.encoder is not None:
            self.encoder.detach()
        for handle in self._handles:
            handle.remove()
        if self._linear is not None:
            self._linear.detach()
        hf.restore_checkpointing(self._checkpointed, CheckpointCarrier)
        detach_generate(self.model)
        self._own_attention.remove()
        release(self, self._configs)
        _attached.discard(self)
        if not _attached:
            untell_packing()

    def gather(self, local: Tensor, length: int | None = None) -> Tensor:
        """[B, s, ...] of this rank to [B, S, ...] without padding; S is that of the row it comes from, or `length`."""
        length = self.outputs.length_of(local, self.gather_point is not None, length)
        if self.outputs.is_full(local) or (self.gather_point is not None and local.shape[1] == length):
            return local  # the head has worked on the full row
        return gather_rows(local, length, self.state)

    def _enter(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        inputs = {**dict(zip(self._signature, args, strict=False)), **kwargs}
        given = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs.get("input_ids")
        if given is None:
            return args, kwargs  # the backbone's own error names what is missing
        length = given.shape[1]
        full = self._runs_unsharded(inputs)
        self._own_attention.follow(cut=not full and self.state.sp_size > 1)
        extra = 0 if full else -length % self.state.sp_size
        row, documents = Row(self, length, length + extra, full), None
        if not full:
            if not self._compared and self.state.sp_size > 1:  # once: a loader that assigns wrongly always does
                check_same_rows(given, self.state)
                self._compared = True
            inputs, documents = self._prepare(inputs, given, extra, row)
            self.outputs.add(length)
        hf.wrap_checkpointing(self._checkpointed, CheckpointCarrier)
        if self._linear is not None:
            self._linear.enter()
        enter(row, row=row, documents=documents)
        if (call := current().call) is not None and call.owner is self:
            call.row = row
        return (), inputs

    def _note_cache(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        kwargs = {**dict(zip(self._model_signature, args, strict=False)), **kwargs}
        call = Call(self, hf.uses_cache(kwargs), is_generating(model), kwargs.get("position_ids"))
        enter(call, call=call)

    def _forget_cache(self, model: nn.Module, args: tuple, output: object) -> None:
        call = current().call
        if call is None or call.owner is not self:
            return  # `_note_cache` did not run
        leave(call)
        if output is None:
            explain_dtypes(model, sys.exception())
        if call.row is not None and not call.row.full and self.state.sp_size > 1:
            self.outputs.note(output, call.row.length, made_full=self.gather_point is not None)
        if output is not None and call.row is None and self.state.sp_size > 1:  # None: an error is on its way
            refuse_unshared(self.name, type(self.points.decoder).__name__.removeprefix("FSDP"))

    def _runs_unsharded(self, inputs: dict[str, Any]) -> bool:
        """With a cache and in `generate` every rank of the SP group runs the full row."""
        call = current().call
        if call is not None and call.owner is self:
            requested, generating = call.cached, call.generating
        else:
            requested, generating = hf.uses_cache(inputs), is_generating(self.model)
        if requested and torch.is_grad_enabled() and self.state.sp_size > 1:
            raise UnsupportedError(
                "`use_cache=True` or `past_key_values` cannot be combined with gradients under sequence parallelism: "
                "leave them out in training, or generate under torch.no_grad()."
            )
        return requested or generating

    def _prepare(
        self, inputs: dict[str, Any], given: Tensor, extra: int, row: Row
    ) -> tuple[dict[str, Any], Documents]:
        if self.state.sp_size > 1:
            check_available(inputs, self.config, crosses=self._crosses)
        positions, call = inputs.get("position_ids"), current().call
        if positions is None and call is not None and call.owner is self:
            positions = call.positions
        positions = find_positions(positions, given, inputs.get("attention_mask"), self.config)
        # Tables of learned positions may begin elsewhere than at 0 (RoBERTa): the model makes its own positions then.
        made = inputs.get("position_ids") is None and not (self.points.rotary and "position_ids" in self._signature)
        inputs = {**inputs, "position_ids": positions}
        if "use_cache" in self._signature or "use_cache" in inputs:
            inputs["use_cache"] = False
        if self._wants_mask:
            check_mask_given(self.name, inputs.get("attention_mask"))
        mask = prepare_mask(
            inputs,
            given,
            name=self.name,
            fill=bool(extra) and self._looks_ahead,
            on_demand=self._masks_on_demand,
            takes_mask="attention_mask" in self._signature,
            sp_size=self.state.sp_size,
        )
        pad_token = getattr(self.config, "pad_token_id", None)
        if inputs.get("visual_pos_masks") is not None:
            inputs = cut_deepstack(inputs, row.padded, self.state)
        inputs = pad_inputs(inputs, extra, pad_token if isinstance(pad_token, int) and pad_token >= 0 else 0)
        documents = row_documents(inputs["position_ids"], given.shape[0], extra)
        check_documents(self._capabilities, documents, mask, positions)
        check_masks_above(self.name, documents, inputs.get("attention_mask"))
        check_counted(self.name, self.points.max_counted, max(row.padded // self.state.sp_size, documents.max_length))
        # transformers reads the mask; the rest may reach compiled modules, and compilers take plain tensors.
        inputs = {k: forget(x) if isinstance(x, Tensor) and k != "attention_mask" else x for k, x in inputs.items()}
        if made:
            del inputs["position_ids"]
        elif self._origin is not None:
            own = self._origin.positions(inputs["position_ids"], inputs.get("input_ids"), inputs.get("attention_mask"))
            inputs["position_ids"] = own
        return inputs, documents

    def _leave(self, decoder: nn.Module, args: tuple, kwargs: dict, output: object) -> Any:
        row = current().row
        if row is None or row.owner is not self:
            return None  # `_enter` raised
        try:
            joined = self._join_output(decoder, output, row)
        finally:
            leave(row)
        if self._linear is not None and output is not None:  # None: an error is on its way
            self._linear.check_called(row)
        return joined

    def _join_output(self, decoder: nn.Module, output: object, row: Row) -> Any:
        if row.full or row.gathered:
            return None
        if self._views_as_row:  # full, with padding, since its last norm
            if self.gather_point is decoder:
                return map_hidden(output, lambda hidden: hidden[:, : row.length])
            output = map_hidden(output, lambda hidden: shard_sequence(hidden, 1, self.state))
            self.outputs.note(output, row.length)
            return output
        hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        check_slice(type(decoder).__name__, hidden, row.padded, self.state.sp_size)
        if self.gather_point is decoder:
            return map_hidden(output, lambda hidden: gather_rows(hidden, row.length, self.state))
        if self.state.sp_size > 1:
            self.outputs.note(output, row.length)
        return None

    def _gather_output(self, module: nn.Module, args: tuple, output: object) -> Any:
        row = current().row
        if row is None or row.full or row.owner is not self:
            return output
        row.gathered = True
        return map_hidden(output, lambda hidden: gather_rows(hidden, row.length, self.state))

    def _gather_input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        row = current().row
        if row is None or row.full or row.owner is not self or not args:
            return None
        full = gather_rows(args[0], row.padded if self._views_as_row else row.length, self.state)
        return (full, *args[1:]), kwargs


def attach_sequence(
    model: nn.Module, state: ParallelState, attention: str = "auto", full_output: bool = False
) -> SequenceAttachment:
    """Make a stock decoder-only model take full rows and work on this rank's slice; packed documents stay apart.

    Args:
        model: a transformers model or a `PeftModel` on one. Nothing of it is copied.
        state: whose SP group shares the rows; with sp_size 1 only packing is installed.
        attention: "auto" selects the varlen attention where the model has sdpa (or eager and nothing else); "keep"
            leaves the selected implementation.
        full_output: put the backbone's output together again, for a head that does not work token by token.

    Raises:
        UnsupportedError: the model has no shard points, or fewer query heads than sp_size.
    """
    if attention not in ("auto", "keep"):
        raise ValueError(f"`attention` ({attention!r}) must be 'auto' or 'keep'.")
    return SequenceAttachment(model, state, attention, full_output)
