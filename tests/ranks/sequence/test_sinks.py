"""Attention sinks on the varlen kernel, which is emulated, under Ulysses: each rank's heads with their own sinks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.parity import Run, Setting, compare
from tests.unit.attention import emulated


def _compare_on_the_kernel(setting: Setting, run: Run, path: str) -> tuple[dict[str, Any], set[tuple[int, int]]]:
    with pytest.MonkeyPatch.context() as patch:
        windows = emulated.use(patch, setting.dtype)
        return compare(setting, run, path), set(windows)


@pytest.mark.parametrize("plan", ["sp=2", "sp=3"])
def test_sinks_on_the_kernel_equal_one_rank(ranks, reference, plan: str) -> None:
    setting = Setting("gpt_oss")
    path: Path = reference(setting)
    results = ranks(int(plan[-1])).run(
        _compare_on_the_kernel, setting, Run(plan, checkpointing=True), str(path), timeout=120
    )
    for errors, windows in results:
        assert windows == {(6, 0), (-1, 0)}
        assert not errors["one_sided"]
        worst = {key: errors[key] for key in ("loss", "logits", "gradient", "norm")}
        assert max(worst.values()) < 1e-5, (worst, errors["parameter"])
    assert setting.dtype == torch.float32
