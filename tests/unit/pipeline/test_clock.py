"""The simulated clock of the pipeline's benchmark: what it measures is what the formulas of the schedule say."""

from __future__ import annotations

import argparse

import pytest

from benchmarks._pipeline import Stage, bubble, replay
from benchmarks.pipeline import check, measure_bubble
from hf_veomni.pipeline.schedule import one_forward_one_backward


def _stages(ranks: int, count: int, chunks: int = 1, sent: int = 0, forward: float = 1.0) -> list[Stage]:
    found = []
    for rank in range(ranks):
        actions = one_forward_one_backward(rank, ranks, count, chunks)
        seconds = [forward * (2 if action.backward else 1) / chunks for action in actions]
        found.append(Stage(actions, seconds, [sent] * len(actions), 0, 1, 1, chunks))
    return found


@pytest.mark.parametrize(("ranks", "count", "chunks"), [(1, 3, 1), (2, 2, 1), (4, 8, 1), (4, 9, 2), (3, 6, 4)])
def test_bubble_is_that_of_the_formula(ranks: int, count: int, chunks: int) -> None:
    assert bubble(replay(_stages(ranks, count, chunks))) == pytest.approx((ranks - 1) / (chunks * count + ranks - 1))


def test_messages_take_their_time() -> None:
    ran = replay(_stages(2, 1, sent=10), bandwidth=5.0, latency=0.5)
    assert [(one.begin, one.end) for one in ran[1]] == [(3.5, 4.5), (4.5, 6.5)]
    assert ran[0][1].begin == 9.0


def test_a_small_window_holds_what_the_schedule_says() -> None:
    options = argparse.Namespace(stages=[2], chunks=[1, 2], times=[1], tokens=16, repeats=1)
    # So few tokens take no time that could be compared.
    rows = [{**row, "bubble": row["unequal"]} for row in measure_bubble(options)]
    assert [row["held_formula"] for row in rows] == [[2, 1], [2, 1.5]]
    assert check(rows, 0.05) == []
    name = "pp=2, 2 micro-batches"
    assert check([{**rows[0], "held": [3.0, 1.0]}], 0.05) == [
        f"{name}: stage 0 holds 3.00 micro-batches, by the formula 2"
    ]
    assert check([{**rows[0], "bubble": 0.9, "unequal": 0.4}], 0.05) == [
        f"{name}: bubble 0.900, and 0.400 by its busiest rank"
    ]
