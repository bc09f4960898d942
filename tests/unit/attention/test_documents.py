"""Boundaries of packed documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_veomni.attention.documents import Documents
from hf_veomni.context import current

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def test_document_begins_where_positions_do_not_count_on() -> None:
    documents = Documents.from_position_ids(torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 6, 6, 7, 9]]))
    assert documents.lengths == ((3, 2, 1), (3, 2, 1))
    assert documents.cu_seqlens.tolist() == [0, 3, 5, 6, 9, 11, 12]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.max_length == 3
    assert (documents.num_rows, documents.row_length) == (2, 6)
    assert list(documents.spans()) == [(0, 0, 3), (0, 3, 5), (0, 5, 6), (1, 0, 3), (1, 3, 5), (1, 5, 6)]


@given(rows=st.lists(LENGTHS, min_size=1, max_size=3))
def test_positions_and_lengths_tell_the_same(rows: list[list[int]]) -> None:
    size = max(map(sum, rows))
    rows = [row + [size - sum(row)] if sum(row) < size else row for row in rows]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    told, found = Documents.from_lengths(rows), Documents.from_position_ids(positions)
    assert found.lengths == told.lengths == tuple(map(tuple, rows))
    assert found.cu_seqlens.tolist() == told.cu_seqlens.tolist()
    assert found.is_packed == (max(map(len, rows)) > 1)


def test_rows_of_one_document_are_not_packed() -> None:
    assert not Documents.from_position_ids(torch.arange(5).expand(3, -1)).is_packed
    assert Documents.from_lengths([[5], [4, 1]]).is_packed


@pytest.mark.parametrize("shape", [(5,), (3, 1, 5), (1, 0)])
def test_positions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`position_ids` \[.*\] must be \[rows, tokens\]"):
        Documents.from_position_ids(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("lengths", [[], [[]], [[3, 0]], [[3], []]])
def test_documents_without_tokens_are_refused(lengths: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="documents of 1 token or more"):
        Documents.from_lengths(lengths)


def test_rows_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of \[3, 4\] tokens"):
        Documents.from_lengths([[3], [2, 2]])


def test_no_documents_are_set_outside_of_a_forward() -> None:
    assert current().documents is None
