"""A minute of the soak: what is killed again and again ends as if it had not been; and the comparison can fail."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.soak import driver
from tests.soak.driver import same, soak
from tests.soak.training import Variant

VARIANTS = [Variant(saving="async"), pytest.param(Variant(experts=True, lora=True), marks=pytest.mark.slow)]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path, variant: Variant) -> None:
    tally = soak(variant, tmp_path, kills=6, until=time.monotonic() + 30, seed=1)
    assert tally.kills > 0 and tally.runs > 0, tally
    assert not tally.lost and not tally.wrong and not tally.stalled and not tally.failed, tally


def test_the_comparison_is_bit_by_bit() -> None:
    one = {"w": torch.ones(3), "m": torch.zeros(2)}
    other = {"w": torch.ones(3).nextafter(torch.full((3,), 2.0)), "m": torch.zeros(2)}
    assert same(one, dict(one)) and not same(one, other) and not same(one, {"w": one["w"]})


def test_a_start_from_an_earlier_checkpoint_counts_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the driver has seen a later one than a run can start from."""
    monkeypatch.setattr(driver, "newest", lambda run: 1000)
    tally = soak(Variant(steps=4), tmp_path, kills=1, until=time.monotonic() + 5, seed=0)
    assert tally.lost > 0, tally
