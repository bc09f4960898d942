"""Head layout: every query head once, with the key/value head it reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_veomni.sequence.ulysses import head_layout


@given(st.integers(1, 12), st.integers(1, 8), st.data())
def test_layout_covers_every_head_with_its_key_value_head(num_key_value, group, data):
    num_query = num_key_value * group
    sp_size = data.draw(st.integers(1, num_query))
    layout = head_layout(num_query, num_key_value, sp_size)
    assert [h for first, last in layout.query for h in range(first, last)] == list(range(num_query))
    sizes = [last - first for first, last in layout.query]
    assert max(sizes) - min(sizes) <= 1
    for rank, ((first, last), (low, _)) in enumerate(zip(layout.query, layout.key_value, strict=True)):
        reads = [low + i for i, n in enumerate(layout.counts(rank)) for _ in range(n)]
        assert reads == [h // group for h in range(first, last)]


def test_smollm2_heads_over_two_ranks():
    layout = head_layout(9, 3, 2)
    assert layout.query == ((0, 5), (5, 9))
    assert layout.key_value == ((0, 2), (1, 3))
    assert (layout.counts(0), layout.counts(1)) == ([3, 2], [1, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((2, 2, 4), r"`sp_size` \(4\) must not exceed .*\(2\)"), ((5, 2, 2), r"\(5\) must be a multiple .*\(2\)")],
)
def test_impossible_layouts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        head_layout(*arguments)
