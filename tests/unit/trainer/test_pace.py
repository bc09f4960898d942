"""Which rank is called slow."""

from __future__ import annotations

import torch

from hf_veomni.trainer.facts import READING, WAITING
from hf_veomni.trainer.pace import Pace


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _facts(reading: list[float], waiting: list[float]) -> torch.Tensor:
    facts = torch.zeros(len(reading), 11, dtype=torch.long)
    facts[:, READING] = (torch.tensor(reading) * 1e6).long()
    facts[:, WAITING] = (torch.tensor(waiting) * 1e6).long()
    return facts


def _pace(reading: list[float], waiting: list[float], step: float = 1.0) -> tuple[Pace, _Clock]:
    clock = _Clock()
    pace = Pace(clock)
    for _ in range(2):  # of the start, which is not counted
        clock.now += 100
        pace.add(_facts([0.0] * len(reading), [99.0, *[0.0] * (len(reading) - 1)]))
    _go_on(pace, clock, reading, waiting, step)
    return pace, clock


def _go_on(pace: Pace, clock: _Clock, reading: list[float], waiting: list[float], step: float = 1.0) -> None:
    for _ in range(10):
        clock.now += step
        pace.add(_facts(reading, waiting))


def test_the_rank_that_does_not_wait_is_named_with_its_share() -> None:
    pace, _ = _pace([0.01, 0.02, 0.4], [0.42, 0.41, 0.01])
    assert (pace.take() or "").startswith(
        "The other ranks waited 0.4 s a step for rank 2, 40% of a step's 1 s. It read its batches for 0.4 s a step, "
        "the others for 0.01 s"
    )


def test_each_rank_is_named_once() -> None:
    pace, clock = _pace([0.0, 0.0], [0.5, 0.0])
    assert pace.take() is not None
    _go_on(pace, clock, [0.0, 0.0], [0.5, 0.0])
    assert pace.take() is None
    _go_on(pace, clock, [0.0, 0.0], [0.0, 0.5])
    assert "for rank 0" in (pace.take() or "")


def test_little_is_not_told() -> None:
    assert _pace([0.1, 0.0], [0.05, 0.01])[0].take() is None  # 4 % of a step
    assert _pace([0.0, 0.0], [0.015, 0.0], step=0.05)[0].take() is None  # 15 ms
    assert _pace([0.0, 0.0, 0.0], [0.5, 0.0, 0.0])[0].take() is None  # one that is early
    assert Pace().take() is None
    assert _pace([0.3], [0.0])[0].take() is None


def test_a_hiccup_is_not_told() -> None:
    pace, clock = _pace([0.0, 0.0], [0.0, 0.0])
    assert pace.take() is None
    clock.now += 1
    pace.add(_facts([0.9, 0.0], [0.0, 0.9]))
    assert pace.take() is None
