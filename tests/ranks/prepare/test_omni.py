"""Loss, logits of all heads, every gradient and the norm of a composed model equal those of one rank, in fp32.

Rows mix what is seen, heard, drawn and said, and some data ranks lack all of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_veomni import ParallelPlan
from tests.ranks.omni import MIXED, Setting, compare, compute_reference, evaluate_whole, generate, make_model, make_row

TEXT = ("t", "tt")
FROZEN = {"vision": {"freeze": True}, "image": {"freeze": True}}
TOWERS = {"modules": {"encoders.*.tower": {"fsdp": "free"}, "decoders.*.head": {"fsdp": "free"}}}


@pytest.fixture
def check(ranks, tmp_path: Path):
    def check(setting: Setting, plan: str | dict, checkpoint: str | None = None) -> None:
        parsed = ParallelPlan.parse(plan)
        world_size = parsed.sp_size * len(setting.rows)
        compute_reference(setting, tmp_path / "reference.pt")
        found = ranks(world_size).run(compare, setting, plan, str(tmp_path / "reference.pt"), checkpoint, timeout=120)
        worst = {key: max(errors[key] for errors in found) for key in ("loss", "logits", "gradient", "norm")}
        summary = f"{worst}, worst gradient: {[errors['parameter'] for errors in found]}"
        print(summary)
        assert not any(errors["one_sided"] for errors in found), found[0]["one_sided"]
        assert max(worst.values()) < 1e-5, summary

    return check


def test_mixed_row_at_sp2_equals_one_rank(check) -> None:
    check(Setting(rows=(MIXED,)), "sp=2")


def test_encoders_that_peft_saves_whole_equal_one_rank(check) -> None:
    """PEFT puts a wrapper with two copies in the place of an encoder."""
    check(Setting(rows=(MIXED,), lora=True, saved=("encoders.vision", "encoders.audio")), "sp=2")


def test_data_rank_without_modalities_equals_one_rank(check) -> None:
    check(Setting(rows=(MIXED, TEXT)), {"dp_shard_size": 2, **TOWERS})


def _count_encoded(modules: dict) -> int:
    """Images that this rank's vision tower takes of a row with three."""
    from hf_veomni import prepare_omni

    model = prepare_omni(make_model(Setting(rows=(MIXED,))), ParallelPlan(sp_size=2, modules=modules))
    seen = []
    model.encoders["vision"].tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model(**make_row(MIXED, seed=0))
    return sum(seen)


def test_ranks_share_the_pictures_of_a_row(ranks) -> None:
    assert sorted(ranks(2).run(_count_encoded, {}, timeout=60)) == [1, 2]
    replicated = {"encoders.vision": {"sp": "replicate"}}
    assert ranks(2).run(_count_encoded, replicated, timeout=60) == [3, 3]


def _generates_as_one_rank(ranks, setting: Setting, plan: str, world_size: int) -> None:
    wanted = generate(setting, "")
    for found in ranks(world_size).run(generate, setting, plan, timeout=120):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_generated_text_pictures_and_sounds_equal_one_rank(ranks) -> None:
    _generates_as_one_rank(ranks, Setting(rows=(MIXED,)), "sp=2", 2)


def test_metrics_see_whole_rows_of_all_heads(ranks) -> None:
    setting = Setting(rows=(MIXED,))
    wanted = evaluate_whole(setting, "")
    for found in ranks(2).run(evaluate_whole, setting, "sp=2", timeout=60):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


SETTINGS = {
    "mixed": Setting(rows=(MIXED,)),
    "frozen": Setting(rows=(MIXED,), changes=FROZEN),
    "lora": Setting(rows=(MIXED,), lora=True),
    "saved": Setting(rows=(MIXED,), lora=True, saved=("encoders.vision", "encoders.audio")),
    "text": Setting(rows=(TEXT,)),
    "accumulated": Setting(rows=(MIXED,), micro_batches=2),
    "moe": Setting(rows=(MIXED,), moe=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("sp", [2, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_equal_one_rank(check, name: str, sp: int) -> None:
    check(SETTINGS[name], f"sp={sp}")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rules", [{}, TOWERS], ids=["root", "units"])
def test_settings_equal_one_rank_where_a_data_rank_lacks_modalities(check, name: str, rules: dict) -> None:
    rows = (TEXT, MIXED) if name != "text" else (TEXT, ("tt",))
    check(replace(SETTINGS[name], rows=rows), {"sp_size": 2, "dp_shard_size": 2, **rules})


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["sp=2,ep=2", "sp=2,dp_shard=2,ep=2", "sp=2,dp_shard=2,ep=4", "dp_shard=2,ep=2"])
@pytest.mark.parametrize("lora", [False, True])
def test_sharded_experts_equal_one_rank(check, plan: str, lora: bool) -> None:
    rows = (MIXED, TEXT) if "dp" in plan else (MIXED,)
    check(Setting(rows=rows, moe=True, lora=lora), plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "world_size"), [("sp=4", 4), ("sp=2,dp_shard=2", 4), ("dp_shard=2", 2), ("sp=2,ep=2", 2)]
)
@pytest.mark.parametrize("lora", [False, True])
def test_generation_under_plans_equals_one_rank(ranks, plan: str, world_size: int, lora: bool) -> None:
    _generates_as_one_rank(ranks, Setting(rows=(MIXED,), moe="ep" in plan, lora=lora), plan, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["sp=2", "sp=2,dp_shard=2", "sp=2,dp_shard=2,ep=2"])
def test_built_on_meta_equals_one_rank(check, tmp_path: Path, plan: str) -> None:
    setting = Setting(rows=(MIXED, TEXT) if "dp" in plan else (MIXED,), moe="ep" in plan)
    make_model(setting).save_pretrained(tmp_path / "saved")
    check(setting, plan, str(tmp_path / "saved"))
