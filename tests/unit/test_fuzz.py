"""A short form of `python -m tests.fuzz`; and its judgement can say no."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.fuzz import cases
from tests.fuzz.__main__ import fuzz


@pytest.mark.parametrize("name", cases.CASES)
def test_what_is_made_up_works_or_is_refused_by_name(name: str) -> None:
    found = fuzz(name, 40 if name in ("recipes", "batches") else 100, number=1)
    assert found["faults"] == 0, found["fault"]
    assert found["worked"] and found["refused"], found


def test_an_error_from_below_is_none_of_ours() -> None:
    tally: Counter[str] = Counter()
    with pytest.raises(cases.Fault, match="RuntimeError from"):
        cases.attempt(tally, lambda: torch.ones(2) @ torch.ones(3))
    with pytest.raises(cases.Fault, match="ValueError from"):
        cases.attempt(tally, lambda: int("x"))
    assert not tally


def test_a_hang_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "LIMIT", 1)

    def hang() -> None:
        while True:
            pass

    with pytest.raises(cases.Fault, match="not done after"):
        cases.attempt(Counter(), hang)
