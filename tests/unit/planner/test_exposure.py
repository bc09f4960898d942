"""What of exchanges is exposed, where the answer can be counted on fingers."""

from __future__ import annotations

import pytest

from hf_veomni.planner.exposure import Chunked, Segment, bare_chunks, bare_pairs

PASSES = (False, True)


def test_pairs_without_compute_hide_nothing() -> None:
    segments = [Segment(0, 2, "sp", 3.0), Segment(0, 2, "sp", 1.0), Segment(0, 2, "ep", 5.0)]
    assert bare_pairs(segments, PASSES) == {"sp": 2 * 4.0, "ep": 2 * 5.0}


def test_pairs_hide_what_the_segments_around_cover() -> None:
    # The forward covers 3 of the 4 seconds of one sequence, and all of the other one's; the backward covers all.
    segments = [Segment(3, 2, "sp", 4.0), Segment(5, 2, "sp", 4.0)]
    assert bare_pairs(segments, (False,)) == {"sp": 1.0}
    assert bare_pairs(segments, (True,)) == {"sp": 0.0}


def test_the_first_and_the_last_chunk_are_bare() -> None:
    fast = Chunked([3, 1, 1, 1], [1, 1, 1, 2], seconds=[1e9] * 4, backward=2)
    assert bare_chunks(fast, PASSES) == 2 * (3 + 2)
    slow = Chunked([3, 1, 1, 1], [1, 1, 1, 2], seconds=[0] * 4, backward=2)
    assert bare_chunks(slow, PASSES) == 2 * 11
    half = Chunked([1, 1], [1, 1], seconds=[0.5, 0.5], backward=1)  # under 1 of the other's
    assert bare_chunks(half, (False,)) == pytest.approx(1 + 1 + 0.5 + 0.5)
