"""Mask objects against the dense masks of transformers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedConfig, masking_utils

from hf_veomni.attention import mask_reader as pattern_module
from hf_veomni.attention.blocks import plan_blocks
from hf_veomni.attention.documents import Documents
from hf_veomni.attention.mask import MaskSpec, omni_mask
from hf_veomni.attention.mask_reader import Pattern, read_pattern
from hf_veomni.host import knows
from tests.unit.attention.dense import documents_set

S = 24
NO_PADDING = torch.zeros(2, dtype=torch.long)
LENGTHS = ((5, 1, 11, 7), (16, 8))


def make_spec(function: Callable, documents: Documents | None = None, **kwargs: Any) -> MaskSpec:
    with documents_set(documents):
        spec = omni_mask(2, S, S, mask_function=function, **kwargs)
    assert isinstance(spec, MaskSpec)
    return spec


def dense(spec: MaskSpec, size: int = 5) -> Tensor:
    """The [B, S, S] mask that a mask object stands for, put together from its blocks."""
    mask = torch.zeros(spec.num_rows, spec.row_length, spec.row_length, dtype=torch.bool)
    for block in plan_blocks(spec, size, split_plain=True):
        (row, first, last), (_, low, high) = block.queries, block.keys
        mask[row, first:last, low:high] = spec.block(block.queries, block.keys)
    return mask


def stock(function: Callable, padding: Tensor | None = None, **kwargs: Any) -> Tensor:
    """What transformers would mask, but for padded queries, which attend to nothing here."""
    mask = masking_utils.sdpa_mask(
        2, S, S, mask_function=function, attention_mask=padding, allow_is_causal_skip=False, **kwargs
    )[:, 0]
    return mask if padding is None else mask & padding[:, :, None]


def same_document(lengths: tuple[tuple[int, ...], ...]) -> Tensor:
    numbers = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    return numbers[:, :, None] == numbers[:, None, :]


def positions_of(lengths: tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def user_function(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx - kv_idx) % 3 == batch_idx


FUNCTIONS = {
    "causal": (masking_utils.causal_mask_function, Pattern(after=0)),
    "bidirectional": (masking_utils.bidirectional_mask_function, Pattern()),
    "sliding": (masking_utils.sliding_window_causal_mask_function(4), Pattern(before=3, after=0)),
    "bidirectional sliding": (masking_utils.sliding_window_bidirectional_mask_function(4), Pattern(4, 4)),
    "tighter of two": (
        masking_utils.and_masks(
            masking_utils.sliding_window_overlay(9), masking_utils.sliding_window_bidirectional_mask_function(4)
        ),
        Pattern(4, 4),
    ),
    "left only": (masking_utils.sliding_window_overlay(4), Pattern(before=3)),
}
UNKNOWN = {
    "user's": user_function,
    "user's and causal": masking_utils.and_masks(user_function, masking_utils.causal_mask_function),
    "user's or causal": masking_utils.or_masks(user_function, masking_utils.causal_mask_function),
    "blocks of an image": masking_utils.or_masks(
        masking_utils.causal_mask_function,
        masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1] * 3, [2] * 4 + [-1] * 20])),
    ),
    "empty window": masking_utils.sliding_window_overlay(0),
    "padding inside": masking_utils.padding_mask_function(torch.arange(2 * S).view(2, S) % 5 > 0),
}


def packed(function: Any, positions: Tensor, segments: Tensor) -> Any:
    """The mask function within each document, as `create_causal_mask` makes it of `position_ids`."""
    return masking_utils.and_masks(
        masking_utils.packed_sequence_mask_function(segments),
        masking_utils.remap_positions_for_packed_sequence(function, positions),
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_known_functions_are_read(name: str) -> None:
    function, expected = FUNCTIONS[name]
    assert read_pattern(function) == expected
    spec = make_spec(function)
    assert not spec.evaluate
    assert dense(spec).equal(stock(function))


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_functions_are_evaluated(name: str, use_vmap: bool) -> None:
    spec = make_spec(UNKNOWN[name], use_vmap=use_vmap)
    assert spec.evaluate
    assert dense(spec).equal(stock(UNKNOWN[name]))


def test_functions_of_single_indices_are_evaluated_by_vmap() -> None:
    table = torch.rand(S, S, generator=torch.Generator().manual_seed(0)) < 0.5

    def function(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return table[q_idx][kv_idx]  # not what broadcasting makes of it

    assert dense(make_spec(function, use_vmap=True)).equal(table.expand(2, -1, -1))


@pytest.mark.parametrize("name", FUNCTIONS | UNKNOWN)
def test_documents_are_kept_apart(name: str) -> None:
    function = UNKNOWN[name] if name in UNKNOWN else FUNCTIONS[name][0]
    spec = make_spec(function, Documents.from_lengths(LENGTHS))
    assert dense(spec).equal(stock(function) & same_document(LENGTHS))


@pytest.mark.parametrize("name", FUNCTIONS | {"user's": None})
@pytest.mark.parametrize("told_too", [False, True])
def test_packing_in_the_function_is_found(name: str, told_too: bool) -> None:
    function = UNKNOWN[name] if name in UNKNOWN else FUNCTIONS[name][0]
    positions = positions_of(LENGTHS)
    function = packed(function, positions, masking_utils.find_packed_sequence_indices(positions))
    spec = make_spec(function, Documents.from_lengths(LENGTHS) if told_too else None)
    assert spec.evaluate == (name in UNKNOWN)
    assert [tuple(span) for span in spec.spans] == list(Documents.from_lengths(LENGTHS).spans())
    assert dense(spec).equal(stock(function))


def test_boundaries_of_both_sources_count() -> None:
    positions = positions_of(((8, 16), (24,)))
    function = packed(
        masking_utils.causal_mask_function, positions, masking_utils.find_packed_sequence_indices(positions)
    )
    spec = make_spec(function, Documents.from_lengths(((12, 12), (4, 20))))
    assert [tuple(span) for span in spec.spans] == [(0, 0, 8), (0, 8, 12), (0, 12, 24), (1, 0, 4), (1, 4, 24)]


@pytest.mark.parametrize("breaks", ["documents in pieces", "jumping positions"])
def test_packing_of_another_make_is_evaluated(breaks: str) -> None:
    segments, positions = torch.zeros(2, S, dtype=torch.long), torch.arange(S).repeat(2, 1)
    if breaks == "documents in pieces":
        segments[:, 6:12] = 1
    else:
        positions[:, 12:] += 3
    window = masking_utils.sliding_window_causal_mask_function(4)
    function = packed(window, positions, segments)
    spec = make_spec(function)
    assert spec.evaluate
    assert dense(spec).equal(stock(function))


@st.composite
def rows_of_documents(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    edges = [[0, *sorted(draw(st.sets(st.integers(1, S - 1), max_size=6))), S] for _ in range(2)]
    return tuple(tuple(b - a for a, b in pairwise(row)) for row in edges)


@given(lengths=rows_of_documents(), chunk=st.integers(1, 12), offset=st.integers(0, 7))
def test_chunks_restart_per_document(lengths: tuple[tuple[int, ...], ...], chunk: int, offset: int) -> None:
    positions = positions_of(lengths)
    positions[:, : lengths[0][0]] += offset  # a document may begin in the middle
    segments = masking_utils.find_packed_sequence_indices(positions)
    chunked = masking_utils.chunked_causal_mask_function(chunk, NO_PADDING)
    if segments is not None:
        function = packed(chunked, positions, segments)
        spec = make_spec(function)
        assert not spec.evaluate
        assert dense(spec).equal(stock(function))
    spec = make_spec(chunked, Documents.from_lengths(lengths))  # positions kept from the masks
    position = positions_of(lengths)
    same_chunk = position[:, :, None] // chunk == position[:, None, :] // chunk
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    if any(len(row) > 1 for row in lengths):
        assert dense(spec).equal(causal & same_chunk & same_document(lengths))


def padding_of(kind: str) -> Tensor:
    padding = torch.ones(2, S, dtype=torch.bool)
    begin, end = {"left": (0, 7), "right": (20, S), "hole": (5, 9), "row": (0, S)}[kind]
    padding[1, begin:end] = False
    return padding


@pytest.mark.parametrize("kind", ["left", "right", "hole", "row"])
@pytest.mark.parametrize("name", [*FUNCTIONS, "user's", "chunked"])
def test_padding_is_not_attended(name: str, kind: str) -> None:
    padding = padding_of(kind)
    if name == "chunked":
        left = (padding.cumsum(-1) == 0).sum(-1)
        function = masking_utils.chunked_causal_mask_function(5, left)
    else:
        function = UNKNOWN[name] if name in UNKNOWN else FUNCTIONS[name][0]
    spec = make_spec(function, attention_mask=padding)
    assert dense(spec).equal(stock(function, padding))
    assert spec.evaluate == (name in UNKNOWN or kind == "hole")


def test_padding_within_packed_documents_is_not_attended() -> None:
    padding = padding_of("right")
    spec = make_spec(masking_utils.causal_mask_function, Documents.from_lengths(LENGTHS), attention_mask=padding)
    assert not spec.evaluate
    assert dense(spec).equal(stock(masking_utils.causal_mask_function, padding) & same_document(LENGTHS))
    assert spec.kernel_layout.cu_seqlens.tolist() == [0, 5, 6, 17, 24, 40, 44]
    assert spec.kernel_layout.index is not None and spec.kernel_layout.index.tolist() == list(range(44))


def test_all_tokens_is_no_padding() -> None:
    spec = make_spec(masking_utils.causal_mask_function, attention_mask=torch.ones(2, S, dtype=torch.bool))
    assert spec.padding is None and spec.is_full and spec.kernel_layout.index is None


def test_chunks_from_another_begin_are_evaluated() -> None:
    function = masking_utils.chunked_causal_mask_function(5, torch.tensor([0, 3]))
    spec = make_spec(function)
    assert spec.evaluate
    assert dense(spec).equal(stock(function))


def test_absolute_chunks_in_unknown_functions_of_packed_rows_are_refused() -> None:
    function = masking_utils.or_masks(masking_utils.chunked_causal_mask_function(5, NO_PADDING), user_function)
    make_spec(function)
    with pytest.raises(ValueError, match="chunks cannot restart per document"):
        make_spec(function, Documents.from_lengths(LENGTHS))


@pytest.mark.parametrize("offsets", [(1, 4, 3, 0), (4, 6, 2, 0), (4, 4, torch.tensor(0), 0)])
def test_earlier_tokens_in_a_cache_leave_the_mask_to_stock(offsets: tuple) -> None:
    q_length, kv_length, q_offset, kv_offset = offsets
    mask = omni_mask(1, q_length, kv_length, q_offset, kv_offset, allow_is_causal_skip=False)
    expected = masking_utils.sdpa_mask(1, q_length, kv_length, q_offset, kv_offset, allow_is_causal_skip=False)
    assert isinstance(mask, Tensor) and mask.equal(expected)


def test_packed_documents_of_another_shape_are_refused() -> None:
    with documents_set(Documents.from_lengths([(3, 4)])):
        with pytest.raises(ValueError, match="2 rows of 24 tokens .* 1 rows of 7"):
            omni_mask(2, S, S)
    with documents_set(Documents.from_lengths([(7,)])):
        assert omni_mask(2, S, S).is_full


def test_missing_transformers_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(masking_utils, "chunked_overlay")
    pattern_module._known_codes.cache_clear()
    with pytest.raises(ImportError, match="no `chunked_overlay`.*attention='keep'"):
        read_pattern(masking_utils.causal_mask_function)


def test_use_as_a_tensor_is_explained() -> None:
    with pytest.raises(AttributeError, match="no `dtype`: this model uses its attention mask as a tensor"):
        _ = make_spec(masking_utils.causal_mask_function).dtype


def test_masks_made_by_transformers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(masking_utils.AttentionMaskInterface._global_mapping, "omni_test", omni_mask)
    config = PreTrainedConfig(sliding_window=4, attention_chunk_size=6)
    inputs = {"inputs_embeds": torch.zeros(2, S, 1), "attention_mask": None, "past_key_values": None}
    position_ids = positions_of(LENGTHS)
    for name, limits in {
        "create_causal_mask": (None, 0),
        "create_sliding_window_causal_mask": (3, 0),
        "create_chunked_causal_mask": (None, 0),
    }.items():
        config._attn_implementation = "omni_test"
        spec = getattr(masking_utils, name)(config, **inputs, position_ids=position_ids)
        assert (spec.before, spec.after, spec.evaluate) == (*limits, False)
        config._attn_implementation = "sdpa"
        assert dense(spec).equal(getattr(masking_utils, name)(config, **inputs, position_ids=position_ids)[:, 0])


def test_a_lengthened_mask_is_known_on_the_host() -> None:
    """Its padding is made, not read from a device."""
    spec = make_spec(masking_utils.causal_mask_function).lengthened(3)
    assert knows(spec.padding)
    assert dense(spec)[:, :S, :S].equal(dense(make_spec(masking_utils.causal_mask_function)))
    assert not dense(spec)[:, :, S:].any()
