"""Slices of patches: complete merge units, each patch once, in the order of the tower and back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_veomni.modality.ulysses_vit import PatchSlices, check_cut


@pytest.mark.parametrize("sp_size", [2, 3, 8])
@pytest.mark.parametrize("num_units", [1, 6, 7, 24])
@pytest.mark.parametrize("shuffled", [False, True])
def test_slices_hold_each_unit_once(num_units, sp_size, shuffled):
    order = torch.randperm(num_units, generator=torch.Generator().manual_seed(0)) if shuffled else None
    slices = PatchSlices(4 * num_units, 4, sp_size, order)
    patches = torch.arange(1, 4 * num_units + 1)
    parts = [slices.take(patches, rank) for rank in range(sp_size)]
    assert {len(part) for part in parts} == {4 * slices.part} and slices.num_filled == 4 * slices.part * sp_size
    units = torch.cat([part.unflatten(0, (-1, 4))[:count] for part, count in zip(parts, slices.counts, strict=True)])
    torch.testing.assert_close(slices.restore(units).flatten(), patches, rtol=0, atol=0)
    assert not any(part[4 * count :].any() for part, count in zip(parts, slices.counts, strict=True))


def test_fewer_heads_than_ranks_are_refused():
    tower = nn.Module()
    tower.config = SimpleNamespace(model_type="qwen3_vl_vision", num_heads=4)
    check_cut(tower, "model.visual", 4)
    with pytest.raises(ValueError, match=r"`model.visual`, whose 4 attention heads `sp_size` \(8\) must not exceed"):
        check_cut(tower, "model.visual", 8)
