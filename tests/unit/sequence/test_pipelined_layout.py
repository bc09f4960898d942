"""Which heads each chunk of a pipelined Ulysses has: pure index arithmetic."""

from __future__ import annotations

import pytest

from hf_veomni.sequence.pipelined import chunk_layouts
from hf_veomni.sequence.ulysses import head_layout

HEADS = [(32, 8, 8), (32, 8, 2), (9, 3, 2), (5, 1, 2), (8, 4, 2), (16, 16, 4), (24, 2, 4), (6, 2, 3), (4, 4, 4)]


@pytest.mark.parametrize(("num_query", "num_key_value", "sp_size"), HEADS)
def test_every_head_is_sent_once_and_is_there_when_it_is_read(num_query: int, num_key_value: int, sp_size: int):
    layout = head_layout(num_query, num_key_value, sp_size)
    chunks = chunk_layouts(layout)
    for rank in range(sp_size):
        (first, last), (low, high) = layout.query[rank], layout.key_value[rank]
        queries = [head for part, _ in chunks for head in range(*part.query[rank])]
        assert queries == list(range(first, last))
        assert [head for _, fresh in chunks for head in range(*fresh[rank])] == list(range(low, high))
        held: set[int] = set()
        for part, fresh in chunks:
            held = set(sorted(held)[-1:]) | set(range(*fresh[rank]))  # one head is carried
            assert set(range(*part.key_value[rank])) <= held
            assert part.query[rank][0] < part.query[rank][1]


def test_chunks_are_many_and_even():
    assert len(chunk_layouts(head_layout(32, 8, 8))) == 4
    assert len(chunk_layouts(head_layout(64, 8, 2))) == 8
    assert [b - a for part, _ in chunk_layouts(head_layout(24, 2, 2)) for a, b in part.query[:1]] == [1, 2] * 4
    assert len(chunk_layouts(head_layout(4, 2, 4))) == 1
    even = chunk_layouts(head_layout(12, 4, 2))  # 6 heads, 3 to a key/value head
    assert [len({*part.counts(0)}) for part, _ in even] == [1] * len(even)
