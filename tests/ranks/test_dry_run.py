"""A dry run says what ranks that are there use and send: memory within 2 %, bytes of collectives exactly."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from torch import nn

from benchmarks._foresight_ranks import RANK_CASES, RankCase, foresee, measure, measure_step, payloads
from hf_veomni import OmniDataCollatorWithPacking
from hf_veomni.dryrun import DryRun, dry_run
from tests import multimodal


def measure_images(family: str, plan: str, checkpointing: bool) -> dict[str, Any]:
    return measure_step(build_with_tower(family), row_of_images(family), plan, checkpointing)


def build_with_tower(family: str) -> nn.Module:
    kind, config, _ = multimodal.FAMILIES[family][0]()
    return kind(config)


def row_of_images(family: str) -> dict[str, Any]:
    """The samples of a family as one packed sequence, by our collator."""
    _, config, processor = multimodal.FAMILIES[family][0]()
    return OmniDataCollatorWithPacking(processor=processor, model_config=config)(multimodal.samples_of(family))


def compare(foreseen: list[DryRun], found: list[dict[str, Any]], experts: bool) -> None:
    for run, real in zip(foreseen, found, strict=True):
        print(run.rank, run.peak.total, real["peak"], real["allocated"], run.peak.categories, real["categories"])
        print(run.peak.place, run.phases, real["phases"])
        assert run.before == real["before"]
        tolerance = 0.02
        assert run.peak.total == pytest.approx(real["peak"], rel=tolerance)
        for phase, size in run.phases.items():
            assert size == pytest.approx(real["phases"][phase], rel=tolerance), phase
        assert sum(run.kept.values()) == pytest.approx(sum(real["kept"].values()), rel=tolerance)
    calls = [[(c.kind, c.axis, c.ranks, c.calls) for c in run.collectives] for run in foreseen]
    assert calls == [[(c["kind"], c["axis"], c["ranks"], c["calls"]) for c in real["collectives"]] for real in found]
    if not experts:
        assert [[c._asdict() for c in run.collectives] for run in foreseen] == [real["collectives"] for real in found]
    everything = [c._asdict() for run in foreseen for c in run.collectives]
    assert payloads(everything) == payloads([c for real in found for c in real["collectives"]])


SLOW = {"dense, sp=2, checkpointing", "dense, dp_replicate=2,sp=2", "moe, sp=2,ep=2"}


def _marked(case: RankCase) -> Any:
    marks: Any = [pytest.mark.slow] if str(case) in SLOW else []
    return pytest.param(case, marks=marks, id=str(case).replace(" ", ""))


@pytest.mark.parametrize("case", list(map(_marked, RANK_CASES)))
def test_equals_ranks_that_are_there(ranks, case: RankCase) -> None:
    found = ranks(case.world).run(measure, case, timeout=180)
    compare(foresee(case), found, experts=case.kind == "moe")


@pytest.mark.parametrize(
    ("family", "plan", "checkpointing"),
    [
        ("qwen2_5_vl", "", True),
        ("qwen3_vl", "sp=2", False),
        pytest.param("qwen2_5_vl", "sp=2", False, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "sp=2", True, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "", False, marks=pytest.mark.slow),
    ],
)
def test_images_equal_ranks_that_are_there(ranks, family: str, plan: str, checkpointing: bool) -> None:
    found = ranks(2).run(measure_images, family, plan, checkpointing, timeout=180)
    options: dict[str, Any] = {"batch": row_of_images(family), "kernels": "cpu", "checkpointing": checkpointing}
    foreseen = [dry_run(partial(build_with_tower, family), plan, 2, rank=rank, **options) for rank in range(2)]
    compare(foreseen, found, experts=False)
