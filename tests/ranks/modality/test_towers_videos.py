"""A long video is shared by runs of its frames: the numbers of one process, and no rank sees more than its share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.modality.test_towers_families import check_towers

# Patches of 17 frames, which no number of ranks divides; 6 x 10 is cut off at the edges of windows.
LONG = [("video", 17, 6, 10)]
MIXED = [("image", 4, 6), ("video", 9, 4, 4), ("image", 2, 2), ("video", 2, 6, 4), ("image", 8, 4)]
ONE_KIND = [("video", 9, 4, 4), ("video", 2, 6, 4), ("video", 3, 2, 2)]  # GLM has one token for both


@pytest.mark.parametrize("sp_size", [2, 4])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_one_long_video(ranks, family, sp_size):
    check_towers(ranks, sp_size, family, f"sp={sp_size}", [LONG])


@pytest.mark.parametrize("family", ["qwen3_vl", "glm4v"])
def test_videos_and_pictures(ranks, family):
    check_towers(ranks, 2, family, "sp=2", [ONE_KIND if family == "glm4v" else MIXED])


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["sp=2", "sp=4", "sp=2,dp_shard=2"])
@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"checkpointing": True}], ids=lambda x: next(iter(x), ""))
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni", "qwen3_omni", "glm4v"])
def test_every_family(ranks, family, plan, options):
    rows = [[LONG, ONE_KIND if family == "glm4v" else MIXED]]
    if "dp" in plan:
        rows.append([[], LONG])
    check_towers(ranks, 2 if plan == "sp=2" else 4, family, plan, *rows, **options)


def _patches(family: str, items: list[tuple]) -> list[int]:
    """Patches that this rank's tower works on in one call, and those of the row."""
    from hf_veomni import prepare_omni
    from tests.omni_models import FAMILIES, build

    model: Any = prepare_omni(build(family), "sp=2")
    row, seen = FAMILIES[family].row(0, items), []
    model.model.visual.patch_embed.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    model(**row)
    return [sum(seen), len(row["pixel_values_videos"])]


def test_a_rank_sees_its_share_of_the_frames(ranks):
    found = ranks(2).run(_patches, "qwen3_vl", [("video", 16, 4, 4)])
    assert found == [[128, 256]] * 2
