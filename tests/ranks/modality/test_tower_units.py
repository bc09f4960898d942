"""Towers and projectors with FSDP units of their own, on ranks whose rows differ in what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_veomni import ParallelPlan
from tests.ranks.modality.test_towers_families import ALL, FIRST, LAST, NONE, check_towers

UNITS = {
    "qwen3_vl": ("*.visual", "*.visual.blocks.*"),
    "qwen2_5_vl": ("*.visual.blocks.*", "*.visual.merger"),
    "qwen2_5_omni": ("*.visual.blocks.*", "*.audio_tower"),
    "qwen3_omni": ("*.visual", "*.audio_tower.layers.*"),
    "internvl": ("*.vision_tower", "*.multi_modal_projector"),
    "smolvlm": ("*.vision_model.encoder.layers.*", "*.connector"),
    "llava_onevision": ("*.vision_tower", "*.multi_modal_projector"),
    "voxtral": ("*.audio_tower.layers.*",),
}
# Rows of each data rank: everything and nothing, the first item and the last two, in two steps.
ROWS = ([ALL, NONE, FIRST], [NONE, NONE, LAST])


def _plan(family: str, **sizes: int) -> ParallelPlan:
    return ParallelPlan(**sizes, modules={name: {"fsdp": "free"} for name in UNITS[family]})


@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"checkpointing": True}], ids=lambda x: next(iter(x), ""))
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f == "qwen3_omni" else pytest.mark.slow) for f in UNITS]
)
def test_rows_that_differ(ranks: Any, family: str, options: dict[str, bool]) -> None:
    check_towers(ranks, 2, family, _plan(family, dp_shard_size=2), *ROWS, **options)


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f == "qwen3_vl" else pytest.mark.slow) for f in UNITS])
def test_rows_that_differ_beside_shares_of_items(ranks: Any, family: str) -> None:
    check_towers(ranks, 4, family, _plan(family, dp_shard_size=2, sp_size=2), *ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("family", UNITS)
def test_replicas(ranks: Any, family: str) -> None:
    check_towers(ranks, 4, family, _plan(family, dp_replicate_size=2, sp_size=2), *ROWS)


def _refused() -> str:
    from hf_veomni import prepare_omni
    from tests.multimodal import build

    with pytest.raises(ValueError) as error:
        prepare_omni(build("qwen2_audio")[0], ParallelPlan(modules={"*.audio_tower": {"fsdp": "free"}}))
    return str(error.value)


def test_a_tower_that_the_forward_runs_itself_is_refused(ranks: Any) -> None:
    for found in ranks(2).run(_refused):
        assert "names `model.audio_tower`, which only rows with its modality run" in found
        assert "no `get_*_features` of the model runs it" in found


def _hidden_states() -> tuple[int, float]:
    from transformers import LlamaConfig, LlamaModel

    from hf_veomni import prepare_omni

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaModel(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
        found = prepare_omni(model, "dp_shard=2")(input_ids=ids, output_hidden_states=True).hidden_states
    return len(found or ()), max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def test_hidden_states_are_recorded_of_a_sharded_model(ranks: Any) -> None:
    """FSDP2 renames the class by which transformers finds what to record."""
    assert ranks(2).run(_hidden_states) == [(3, 0.0), (3, 0.0)]
