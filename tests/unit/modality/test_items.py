"""Long videos as runs of frames: their balance, their order, and the towers of which that is true."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_veomni.families import TOWERS
from hf_veomni.modality import assign_items, balance_report
from hf_veomni.modality.items import find_items
from tests.grid_towers import build_tower, make_pixels


def _find(grid: list[list[int]], num_ranks: int) -> Any:
    rows = torch.tensor(grid)
    pixels = torch.arange(int(rows.prod(-1).sum())).float()[:, None]
    items = find_items({"pixel_values_videos": pixels, "video_grid_thw": rows}, 32, num_ranks)
    assert items is not None
    return items, pixels, rows


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("frames", [2_000, 1_997])
def test_one_long_video_balances(frames, num_ranks):
    items, _, _ = _find([[frames, 2, 2]], num_ranks)
    assert len(items.costs) <= 8 * num_ranks
    largest = assign_items(items.costs, num_ranks).loads(items.costs).max()
    assert largest / (sum(items.costs) / num_ranks) < 1.01


def test_a_long_video_beside_pictures_balances():
    items, _, _ = _find([[400, 4, 4], [1, 8, 8], [1, 2, 2], [30, 4, 4], [1, 20, 20]], 2)
    assert balance_report(items.costs, assign_items(items.costs, 2)).balanced < 1.02


def test_runs_keep_the_order_of_frames():
    items, pixels, rows = _find([[5, 2, 2], [1, 2, 2], [3, 2, 4]], 2)
    assert items.parts[1] == 1 and sum(items.parts) == len(items.costs) > 3
    whole = items.select(range(len(items.costs)))
    torch.testing.assert_close(whole["pixel_values_videos"], pixels, rtol=0, atol=0)
    assert whole["video_grid_thw"].prod(-1).sum() == rows.prod(-1).sum()
    runs = whole["video_grid_thw"].prod(-1).tolist()
    assert items.join(runs) == rows.prod(-1).tolist()
    second = items.select([1])
    assert second["pixel_values_videos"][0, 0] == runs[0]


def test_short_items_stay_whole():
    items, _, rows = _find([[2, 2, 2]] * 40, 2)
    assert items.parts == [1] * 40
    assert items.select([3])["video_grid_thw"].tolist() == rows[3:4].tolist()


def test_other_towers_keep_videos_whole():
    items, _, _ = _find([[2_000, 2, 2]], 0)
    assert len(items.costs) == 1


def _features(output: Any) -> list[torch.Tensor]:
    return [output.pooler_output, *(output.get("deepstack_features") or ())]


@pytest.mark.parametrize("model_type", sorted(TOWERS))
def test_frames_do_not_know_of_each_other(model_type):
    """A video in one call, and its frames in a call each; sizes at which windows are cut off at the edge."""
    tower = build_tower(model_type).eval()
    pixels, grid = make_pixels(tower, [[3, 6, 10], [2, 4, 4]])
    frames = [[1, h, w] for t, h, w in grid.tolist() for _ in range(t)]
    if model_type in ("glm4v_vision", "glm4v_moe_vision"):  # whose models hand frames to the tower themselves
        grid = torch.tensor(frames)
    blocks = pixels.split([h * w for _, h, w in frames])
    with torch.no_grad():
        wanted = _features(tower(pixels, grid_thw=grid))
        pairs = zip(blocks, torch.tensor(frames)[:, None], strict=True)
        found = [_features(tower(block, grid_thw=frame)) for block, frame in pairs]
    for kind, whole in enumerate(wanted):
        torch.testing.assert_close(torch.cat([frame[kind] for frame in found]), whole, rtol=1e-5, atol=1e-5)
