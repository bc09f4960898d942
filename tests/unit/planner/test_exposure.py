"""What of exchanges is exposed, where the answer can be counted on fingers."""

from __future__ import annotations

import pytest

from hf_veomni.planner.exposure import Border, Chunked, Segment, bare_chunks, bare_pairs

PASSES = (False, True)
LONG = Border(layers=10**18, front=0.25)  # so many layers that the ends of a pass do not count


def test_pairs_without_compute_hide_nothing() -> None:
    segments = [Segment(0, 2, "sp", 3.0), Segment(0, 2, "sp", 1.0), Segment(0, 2, "ep", 5.0)]
    assert bare_pairs(segments, PASSES, LONG) == {"sp": 2 * 4.0, "ep": 2 * 5.0}


def test_pairs_hide_what_the_segments_around_cover() -> None:
    # The forward covers 3 of the 4 seconds of one sequence, and all of the other one's; the backward covers all.
    segments = [Segment(3, 2, "sp", 4.0), Segment(5, 2, "sp", 4.0)]
    assert bare_pairs(segments, (False,), LONG) == {"sp": 1.0}
    assert bare_pairs(segments, (True,), LONG) == pytest.approx({"sp": 0.0}, abs=1e-9)


def test_layers_apart_split_the_segment_between_them() -> None:
    # In front of the first exchange is a quarter of 8 seconds, so 2 of 4 hide one sequence's; behind the second are 6.
    segments = [Segment(8, 2, "sp", 4.0), Segment(4, 2, "sp", 4.0)]
    assert bare_pairs(segments, (False,), LONG) == pytest.approx({"sp": 0.0}, abs=1e-6)
    assert bare_pairs(segments, (False,), Border(10**18, 0.25, framed=True)) == {"sp": 1.0}
    assert bare_pairs(segments, (False,), Border(4, 0.25)) == {"sp": pytest.approx(1.0 / 4)}
    # Nothing is behind the experts' way out: of one of the two sequences it is bare at the end of a pass.
    experts = [Segment(9, 2, "ep", 4.0), Segment(9, 2, "ep", 4.0)]
    assert bare_pairs(experts, PASSES, Border(4, 1.0)) == {"ep": pytest.approx(2 * 4.0 / 2 / 4)}


def test_gradients_of_the_last_exchange_travel_under_the_recomputation() -> None:
    segments, passes = [Segment(4, 2, "ep", 4.0), Segment(4, 2, "ep", 4.0)], (False, False, True)
    late, early = (bare_pairs(segments, passes, Border(10**18, 1.0, early=early))["ep"] for early in (False, True))
    assert late == pytest.approx(0.0, abs=1e-6)
    assert early == pytest.approx(4.0, abs=1e-6)  # 12 seconds of link under 8 of the recomputation
    chunked = Chunked([3, 1, 1, 1], [1, 1, 1, 2], seconds=[1e9] * 4, backward=2)
    assert bare_chunks(chunked, passes, early=True) == 3 * (3 + 2) - 3


def test_the_first_and_the_last_chunk_are_bare() -> None:
    fast = Chunked([3, 1, 1, 1], [1, 1, 1, 2], seconds=[1e9] * 4, backward=2)
    assert bare_chunks(fast, PASSES) == 2 * (3 + 2)
    slow = Chunked([3, 1, 1, 1], [1, 1, 1, 2], seconds=[0] * 4, backward=2)
    assert bare_chunks(slow, PASSES) == 2 * 11
    half = Chunked([1, 1], [1, 1], seconds=[0.5, 0.5], backward=1)  # under 1 of the other's
    assert bare_chunks(half, (False,)) == pytest.approx(1 + 1 + 0.5 + 0.5)
