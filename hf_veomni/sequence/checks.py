"""The input at full length: its positions and mask, its packed documents, and whether a model can keep them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from hf_veomni import hf
from hf_veomni.attention.documents import Documents, find_breaks
from hf_veomni.attention.mask import MaskSpec
from hf_veomni.attention.varlen import VARLEN_NAME
from hf_veomni.errors import UnsupportedError
from hf_veomni.host import apply, make, on_host, remember, with_values
from hf_veomni.sequence.inspect import ShardPoints
from hf_veomni.sequence.origin import Origin


@dataclass(frozen=True)
class Context:
    """What a model's config says of lengths in tokens.

    Attributes:
        limit: of a document, None for any. A rope that is scaled goes as far as the scale says.
        way_out, told_by: what a longer document needs, and what says so.
        switch: from more tokens on rope's frequencies are others, and a row has but one set of them; None: never.
        dynamic: whether they depend on the length itself then (dynamic NTK).
    """

    limit: int | None = None
    way_out: str = ""
    switch: int | None = None
    dynamic: bool = False
    told_by: str = "`max_position_embeddings`"

    @classmethod
    def of(cls, config: object, origin: Origin | None) -> Context:
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None or limit <= 0:  # XLNet's -1 says that there is none
            return cls()
        if origin is not None and origin.limit is not None:
            return cls(min(limit, origin.limit), "split it")
        ropes = _ropes(config)
        kinds = [rope.get("rope_type") for rope in ropes]
        if "dynamic" in kinds:
            return cls(None, "", limit, dynamic=True)
        reach = max([limit, *(int(_original(rope, limit) * (rope.get("factor") or 1)) for rope in ropes)])
        long = [_original(rope, limit) for rope in ropes if rope.get("rope_type") == "longrope"]
        context = cls(reach, "split it, or raise the context in the model's config", min(long, default=None))
        if reach == limit:
            return context
        way_out = "split it, or raise `factor` of the config's `rope_parameters`"
        return replace(
            context, way_out=way_out, told_by="`original_max_position_embeddings` times its rope's `factor`"
        )

    def check(self, longest: int) -> None:
        """Raises UnsupportedError for a document of too many tokens."""
        if self.limit is not None and longest > self.limit:
            raise UnsupportedError(
                f"A document of {longest} tokens is longer than the model's context ({self.told_by}, {self.limit}): "
                f"{self.way_out}."
            )

    def mixes(self, lengths: Sequence[int]) -> bool:
        """Whether packed documents of these lengths would need several sets of frequencies in one row."""
        if self.switch is None or max(lengths) <= self.switch:
            return False
        return len(set(lengths)) > 1 if self.dynamic else min(lengths) <= self.switch


def _original(rope: Mapping[str, Any], limit: int) -> int:
    return rope.get("original_max_position_embeddings") or limit


def _ropes(config: object) -> list[Mapping[str, Any]]:
    """Rope parameters of a config: one set, or one for each type of layer."""
    given = getattr(config, "rope_parameters", None)
    if not isinstance(given, Mapping):
        return []
    if "rope_type" in given:
        return [given]
    return [value for value in given.values() if isinstance(value, Mapping)]


@dataclass(frozen=True)
class Capabilities:
    """What the checks look at.

    Attributes:
        makes_masks: with transformers' functions.
        masks_pack: the backbone hands positions to them, so stock masks separate documents.
        masks_as_tensors: some attention takes nothing else, so that no other can be selected.
        context: how long documents may be.
        scales_rows: its embeddings depend on the share of masked tokens in a row (ESM's token dropout).
    """

    name: str
    context: Context
    points: ShardPoints
    makes_masks: bool
    masks_pack: bool
    masks_as_tensors: bool
    scales_rows: bool = False


def find_positions(given: Any, like: Tensor, mask: object, config: object) -> Tensor:
    """`position_ids` as given, with their values on the host, or those that count the tokens of `like` [B, S, ...]."""
    if given is not None:
        found = with_values(given, on_host(given))  # waits for the device here, or not at all
        check_text_positions(found, mask)
        return found
    found = remember(make(lambda: torch.arange(like.shape[1])[None]), like.device)
    if "mrope_section" in str(getattr(config, "rope_parameters", None)):  # whose own default has all rows
        found = apply(Tensor.expand, found, like.shape[0], -1)
    return found


def prepare_mask(
    inputs: dict[str, Any], like: Tensor, *, name: str, fill: bool, on_demand: bool, takes_mask: bool, sp_size: int
) -> Any:
    """Put the `attention_mask` of the full row into `inputs`; returns the one that tells tokens of a user apart.

    Args:
        inputs: holds `position_ids`.
        like: [B, S, ...].
        fill: rows are to be filled up to a multiple of `sp_size` that all tokens would see.
        on_demand: the model attends differently with a mask than without one.
        takes_mask: the backbone's forward has an `attention_mask`.

    Raises:
        UnsupportedError: rows to be filled up of a model that would attend otherwise with the mask that this takes.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == like.shape[:2]:
        inputs["attention_mask"] = mask = with_values(mask, on_host(mask))
        if bool(on_host(mask).all()) and not on_demand:
            inputs["attention_mask"] = mask = None  # an all-ones mask would switch stock packing off
    if fill and mask is None and takes_mask:
        if on_demand:
            raise UnsupportedError(
                f"{name} attends differently with an `attention_mask` than without one, so a row of {like.shape[1]} "
                f"tokens cannot be filled up to a multiple of {sp_size}: pass a mask."
            )
        if not restarts(inputs["position_ids"]):
            inputs["attention_mask"] = remember(make(torch.ones, like.shape[:2], dtype=torch.long), like.device)
    return mask


def row_documents(positions: Tensor, num_rows: int, padding: int = 0) -> Documents:
    """The documents of rows, which begin where positions do not go on; [.., S] or mRoPE's [3 or 4, B, S].

    Args:
        padding: tokens at the end that only fill the rows up.
    """
    if positions.dim() == 3 and positions.shape[0] != 4:
        documents = Documents.from_lengths(((positions.shape[-1],),) * num_rows, device=positions.device)
    else:  # mRoPE: text positions come first where there are four
        positions = apply(Tensor.__getitem__, positions, 0) if positions.dim() == 3 else positions
        documents = Documents.from_position_ids(apply(Tensor.expand, positions, num_rows, -1))
        documents = replace(documents, positions=positions)
    return replace(documents, padding=padding)


def check_documents(capabilities: Capabilities, documents: Documents, mask: object, positions: Tensor) -> None:
    """Raises UnsupportedError where documents are too long or would see each other."""
    capabilities.context.check(documents.max_length)
    # The dummy document that fills a row up comes last, so a causal mask alone keeps the one before it apart.
    # Without attention there is no mask, and mixers keep documents apart by themselves.
    if not documents.holds_several:
        return
    lengths = [length for row in documents.lengths for length in row[: len(row) - (documents.padding > 0)]]
    if capabilities.context.mixes(lengths) and not _only_padded(positions, mask):
        raise UnsupportedError(
            f"Packed documents of {min(lengths)} to {max(lengths)} tokens: from more than "
            f"{capabilities.context.switch} on the rope of {capabilities.name} has other frequencies, and a row has "
            "one set for all. Give longer documents rows of their own."
        )
    if capabilities.scales_rows:
        raise UnsupportedError(
            f"{capabilities.name} scales embeddings by the share of masked tokens in a row (`token_dropout`), which "
            "is not that of each packed document: train it on one document a row, or set `token_dropout` to False."
        )
    if not capabilities.points.attentions:
        return
    if not capabilities.makes_masks:
        raise UnsupportedError(
            f"Packed documents would see each other: {capabilities.name} makes its attention mask without "
            "transformers' masking functions. Train it on one document a row."
        )
    name = hf.attention_name(capabilities.points.decoder.config)
    if name == VARLEN_NAME:
        return
    if _only_padded(positions, mask):
        return  # one document a row, with some positions for its padding
    if mask is not None or not capabilities.masks_pack:
        why = "beside an `attention_mask`" if mask is not None else f"by the masks of {capabilities.name}"
        out = f"let `prepare_omni` select '{VARLEN_NAME}' (attention='auto')"
        if capabilities.masks_as_tensors:
            out = "train this family on one document a row"
        if mask is not None and capabilities.masks_pack:
            out = f"leave the mask out, or {out}"
        raise UnsupportedError(f"Packed documents are not kept apart {why} with attention '{name}': {out}.")


def check_available(inputs: Mapping[str, Any], config: object, *, crosses: bool) -> None:
    """Raises UnsupportedError for what a cut row has no answer to: foreign keys without shard points, all attention
    weights.

    Args:
        crosses: whether some attention's keys may come from elsewhere, which are cut by head then.
    """
    for name in ("cross_attention_states", "encoder_hidden_states"):
        if inputs.get(name) is not None and not crosses:
            raise UnsupportedError(
                f"`{name}` is not available under sequence parallelism: cross-attention keeps its keys in full, and "
                "they would be exchanged as if they were cut. Use sp_size=1."
            )
    if inputs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise UnsupportedError(
            "`output_attentions` is not available under sequence parallelism: no rank has all weights."
        )


def check_counted(name: str, limit: int | None, longest: int) -> None:
    """Raises UnsupportedError where a layer that counts positions in its slice would count too far."""
    if limit is not None and longest > limit:
        raise UnsupportedError(
            f"A document or slice of {longest} tokens is too long for {name}: from token {limit + 1} on it "
            "scales queries by their place in the row (`attn_temperature_tuning`), which a layer counts in its "
            f"slice. Keep documents, and rows / sp_size, to {limit} tokens."
        )


def restarts(positions: Tensor) -> bool:
    """Whether positions go back within a row: packed documents."""
    return bool((on_host(positions).diff(dim=-1) < 0).any())


def check_masks_above(name: str, documents: Documents, mask: object) -> None:
    """Raises UnsupportedError for packed documents where the model has made its masks above the text backbone."""
    if documents.holds_several and isinstance(mask, (dict, MaskSpec)):
        raise UnsupportedError(
            f"{name} makes its masks above the text backbone, where packed documents are not known: train it on "
            "one document a row, or use its text-only class."
        )


def check_mask_given(name: str, mask: object) -> None:
    """Raises UnsupportedError for rows whose mask the attention kernel would choose (`looks_ahead_by_kernel`)."""
    plain = isinstance(mask, Tensor) and mask.dim() == 2
    if mask is None or plain or (isinstance(mask, MaskSpec) and not mask.evaluate):
        raise UnsupportedError(
            f"{name} was given no `token_type_ids`: what its tokens see then depends on the attention kernel (stock "
            "sdpa looks ahead, stock eager does not). Pass them, 0 for the prefix and 1 for what is to be learned, as "
            "its processor returns them for a text with a suffix."
        )


def check_text_positions(positions: Tensor, mask: object) -> None:
    """Raises UnsupportedError for several documents in a row under mRoPE's [3, B, S]: [4, B, S] tells them apart."""
    if positions.dim() == 3 and positions.shape[0] != 4 and begins_again(positions, mask):
        raise UnsupportedError(
            f"`position_ids` {tuple(positions.shape)} restart within a row, but without text positions documents "
            "cannot be told apart: pass [4, rows, tokens], text positions first."
        )


def begins_again(positions: Tensor, mask: object) -> bool:
    """Whether mRoPE's [3, B, S] have a second document in a row, which begins at 0 on every axis.

    They go back within a document too: after a video the next words count on from its largest side. Padding, which is
    0 in the mask [B, S], has positions of its own.
    """
    begins = (on_host(positions) == 0).all(dim=0)[:, 1:]
    if isinstance(mask, Tensor) and mask.shape == positions.shape[1:]:
        mask = on_host(mask)
        begins = begins & mask[:, 1:].bool() & mask[:, :-1].bool()
    return bool(begins.any())


def _only_padded(positions: Tensor, mask: object) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2 and not _restarts_between_tokens(positions, mask)


def _restarts_between_tokens(positions: Tensor, mask: Tensor) -> bool:
    """Whether some token's position does not follow that of its left neighbour, both of them not padding."""
    real, breaks = on_host(mask).bool(), find_breaks(positions)
    breaks = breaks[0] if breaks.dim() == 3 else breaks
    return bool((breaks & real[:, 1:] & real[:, :-1]).any())


def check_slice(name: str, hidden: object, padded: int, sp_size: int) -> None:
    """Raises UnsupportedError where the backbone `name` returned other hidden states than [B, padded / sp_size,
    ...]."""
    if isinstance(hidden, Tensor) and hidden.shape[1] * sp_size != padded:
        raise UnsupportedError(
            f"{name} returned {hidden.shape[1]} tokens where a slice of {padded} over {sp_size} ranks was expected: "
            "its forward puts the row together again and cannot be cut."
        )


def refuse_unshared(name: str, backbone: str) -> NoReturn:
    """Raises UnsupportedError: the model `name` did without its backbone."""
    raise UnsupportedError(
        f"The forward of {name} did not call {backbone}, which is what cuts rows: every rank of the SP group has "
        "computed all of it. Use sp_size=1."
    )
