"""Vision towers whose patches are cut over the SP ranks give the numbers of one process, at 1/sp of the patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_veomni.families import TOWERS
from tests.ranks.modality.test_towers_families import ALL, NONE, check_towers
from tests.ranks.parity import relative_error

# 11 x 7 merge units, which 2 and 4 do not divide; the edges of windows lie elsewhere than those of slices.
HUGE = [("image", 22, 14)]
ONE_KIND = [("video", 5, 4, 6), ("video", 3, 2, 2)]  # GLM has one token for both
GRIDS = ["qwen2_5_vl", "qwen3_vl", "glm4v"]


def _plan(plan: str, **rules: dict[str, str]) -> Any:
    from dataclasses import replace

    from hf_veomni import ParallelPlan

    return replace(ParallelPlan.from_string(plan), modules={"*.visual": {"sp": "ulysses"}, **rules})


@pytest.mark.parametrize("sp_size", [2, 4])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_one_huge_picture(ranks, family, sp_size):
    check_towers(ranks, sp_size, family, _plan(f"sp={sp_size}"), [HUGE])


@pytest.mark.parametrize("family", GRIDS)
def test_pictures_and_videos(ranks, family):
    check_towers(ranks, 2, family, _plan("sp=2"), [ONE_KIND if family == "glm4v" else ALL])


def _patches(family: str) -> list[int]:
    """Patches that this rank's tower works on for an image and a video, and those of the row."""
    from hf_veomni import prepare_omni
    from tests.omni_models import FAMILIES, build

    model: Any = prepare_omni(build(family), _plan("sp=2"))
    row, seen = FAMILIES[family].row(0, [("image", 8, 4), ("video", 3, 4, 4)]), []
    model.model.visual.blocks[1].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    model(**row)
    return [*seen, len(row["pixel_values"]), len(row["pixel_values_videos"])]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_rank_sees_its_share_of_the_patches(ranks, family):
    assert ranks(2).run(_patches, family) == [[16, 24, 32, 48]] * 2


def test_beside_a_row_of_words(ranks):
    check_towers(ranks, 4, "qwen3_vl", _plan("sp=2,dp_shard=2"), [NONE, HUGE], [HUGE, NONE], checkpointing=True)


def test_fewer_units_than_ranks(ranks):
    check_towers(ranks, 4, "qwen2_5_vl", _plan("sp=4"), [[("image", 2, 2)]], frozen=True)


def test_beside_experts(ranks):
    check_towers(ranks, 4, "qwen3_vl_moe", _plan("sp=2,dp_shard=2,ep=2"), [HUGE], [NONE])


def test_heads_that_the_ranks_do_not_divide(ranks):
    check_towers(ranks, 3, "qwen2_5_vl", _plan("sp=3"), [HUGE])


def test_with_fsdp_units_of_its_own(ranks):
    plan = _plan("sp=2,dp_shard=2", **{"*.visual.blocks.*": {"fsdp": "free"}})
    check_towers(ranks, 4, "qwen3_vl", plan, [ALL, NONE], [NONE, HUGE], checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["sp=2", "sp=4", "sp=2,dp_shard=2", "sp=4,ep=2"])
@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"checkpointing": True}], ids=lambda x: next(iter(x), ""))
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni", "qwen3_omni", "glm4v"])
def test_every_family(ranks, family, plan, options):
    if "ep" in plan and family not in ("qwen3_vl_moe", "qwen3_omni"):
        pytest.skip("a dense model")
    rows = [[HUGE, ONE_KIND if family == "glm4v" else ALL]]
    if "dp" in plan:
        rows.append([NONE, HUGE])
    check_towers(ranks, 2 if plan == "sp=2" else 4, family, _plan(plan), *rows, **options)


def _run_tower(model_type: str) -> dict[str, float]:
    """Features and gradients of a tower whose patches are cut, against those of the tower whole."""
    import torch.distributed as dist

    from hf_veomni import ParallelPlan, init_parallel_state
    from hf_veomni.context import Encoding, within
    from hf_veomni.modality.ulysses_vit import TowerCut
    from tests.grid_towers import build_tower, make_pixels

    tower = build_tower(model_type)
    grid = [[1, 6, 10]] * 3 + [[1, 4, 2]] if model_type.startswith("glm4v") else [[3, 6, 10], [1, 4, 2]]
    pixels, rows = make_pixels(tower, grid)

    def step(scale: float) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        tower.zero_grad(set_to_none=True)
        output = tower(pixels, grid_thw=rows)
        features = [output.pooler_output, *(output.get("deepstack_features") or ())]
        weight = torch.randn(features[0].shape, generator=torch.Generator().manual_seed(3))
        (sum((feature * weight).sum() for feature in features) * scale).backward()
        return features, {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}

    wanted, gradients = step(1.0)
    state = init_parallel_state(ParallelPlan(sp_size=2))
    hooks = TowerCut(tower, state)
    seen: list[int] = []
    watch = tower.patch_embed.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with within(encoding=Encoding(None, "image", cut=True)):
        found, local = step(0.5)
    watch.remove()
    assert seen == [-(-len(pixels) // 8) * 4]
    for gradient in local.values():
        dist.all_reduce(gradient)
    errors = {f"features {i}": relative_error(*pair) for i, pair in enumerate(zip(found, wanted, strict=True))}
    errors |= {n: relative_error(local[n], g) for n, g in gradients.items() if not n.endswith("qkv.bias")}
    hooks.remove()
    again, _ = step(1.0)
    return errors | {"detached": relative_error(again[0], wanted[0])}


@pytest.mark.parametrize("model_type", sorted(TOWERS))
def test_every_tower(ranks, model_type):
    for errors in ranks(2).run(_run_tower, model_type):
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-5, (worst, errors[worst])


def _with_a_cache() -> list[Any]:
    """Logits of the stock model and those with a cache, for which ranks need all features; is attention as before?"""
    from hf_veomni import detach_omni, prepare_omni
    from tests.omni_models import FAMILIES, build

    model, row = build("qwen2_5_vl").eval(), FAMILIES["qwen2_5_vl"].row(0, HUGE)
    row.pop("labels")
    configs = {name: m.config for name, m in model.model.visual.named_modules() if hasattr(m, "config")}
    with torch.no_grad():
        wanted = model(**row).logits
        prepare_omni(model, _plan("sp=2"))
        found = model(**row, use_cache=True).logits
        detach_omni(model)
    return [wanted, found, all(model.model.visual.get_submodule(n).config is c for n, c in configs.items())]


def test_a_cache_and_taking_it_off(ranks):
    for wanted, found, restored in ranks(2).run(_with_a_cache):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert restored


def _refusal(family: str, name: str) -> str:
    from hf_veomni import ParallelPlan, prepare_omni
    from tests.omni_models import build

    with pytest.raises(ValueError) as error:
        prepare_omni(build(family), ParallelPlan(sp_size=2, modules={name: {"sp": "ulysses"}}))
    return str(error.value)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("internvl", "model.vision_tower", "it takes towers of the model types cohere_compass_vision"),
        ("qwen2_5_omni", "model.audio_tower", "'qwen2_5_omni_audio_encoder'), whose patches cannot be cut"),
        ("qwen3_vl", "model.language_model", "no tower whose items can be told apart"),
    ],
)
def test_other_modules_are_refused(ranks, family, name, message):
    for found in ranks(2).run(_refusal, family, name):
        assert message in found and name in found
