"""The planner's formulas against dry runs: memory within 5 %, bytes of each axis within 5 %."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks._foresight import CASES, Case
from benchmarks.foresight import compare_memory

# Of what has come last, what stays in the fast suite.
FAST = ("phi3, 32768, dp_shard=4,sp=2, checkpointing", "deepseek_v3, 65536, dp_shard=4,sp=4,ep=8, checkpointing")
FAST += ("llama, 32768, dp_shard=4,sp=2,overlap=pairs, checkpointing",)
LATER = ("phi3", "glm4_moe", "mla", "deepseek_v2", "deepseek_v3")


def _marked(case: Case) -> Any:
    pairs = case.layout.overlap == "pairs"
    marks: list[Any] = []
    if (case.name in LATER or pairs) and str(case) not in FAST:
        marks.append(pytest.mark.slow)
    return pytest.param(case, marks=marks, id=str(case).replace(" ", ""))


@pytest.mark.parametrize("case", list(map(_marked, CASES)))
def test_formulas_equal_the_dry_run(case: Case) -> None:
    found = compare_memory(case)
    print(found)
    assert found["formula_bytes"] == pytest.approx(found["dry_run_bytes"], rel=0.05)
    sent, measured = found["formula_sent"], found["dry_run_sent"]
    assert sum(sent.values()) == pytest.approx(sum(measured.values()), rel=0.05)
    if not any("/" in axis for axis in measured):
        assert sent == pytest.approx(measured, rel=0.05)
