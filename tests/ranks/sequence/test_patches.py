"""Attentions that never ask the interface, each cut by its own patch, in the forms that their configs give them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sweep.family import sweep_family
from tests.sweep.overrides import OVERRIDES

_RELATIVE = {"relative_attention": True, "position_buckets": 4, "max_relative_positions": 16}
# The scale of queries changes every four tokens, and not after thousands.
_SCALED = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 4,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("falcon", {}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-all-heads": ("falcon", {"multi_query": False, "num_kv_heads": 4}),
    "mpt": ("mpt", {}),
    "mpnet": ("mpnet", {}),
    "xglm": ("xglm", {}),
    "mvp": ("mvp", {}),
    "deberta-shared": ("deberta-v2", {**_RELATIVE, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]}),
    "deberta-own": ("deberta-v2", {**_RELATIVE, "share_att_key": False, "pos_att_type": ["p2c", "c2p"]}),
    "deberta": ("deberta", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "ministral3": ("ministral3", {"rope_parameters": _SCALED}),
    "mistral4": ("mistral4", {}),
}


def _sweep(family: str, overrides: dict[str, Any], plan: str) -> dict[str, Any]:
    before = OVERRIDES.get(family)
    OVERRIDES[family] = {**(before or {}), **overrides}
    try:
        return sweep_family(family, plan)
    finally:
        OVERRIDES.pop(family)
        if before is not None:
            OVERRIDES[family] = before


@pytest.mark.parametrize("case", CASES)
def test_a_patched_family_equals_one_rank(ranks: Any, case: str) -> None:
    for record in ranks(2).run(_sweep, *CASES[case], "sp=2", timeout=60):
        assert (record["outcome"], record["reason"] if record["packed"] == "works" else "") == ("works", "")


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_patched_family_equals_one_rank_on_more(ranks: Any, case: str, world: int) -> None:
    for record in ranks(world).run(_sweep, *CASES[case], f"sp={world}", timeout=60):
        assert record["outcome"] == "works", record


def _detached(family: str) -> tuple[float, int]:
    """Largest difference of a prepared model's logits from its own once it is detached, and patches left."""
    import torch

    from hf_veomni import detach_omni, prepare_omni
    from tests.sweep.tiny import build, choose_class, tiny_config

    torch.manual_seed(0)
    model = build(tiny_config(family), choose_class(family)[1], torch.float32).eval()
    plain = build(tiny_config(family), choose_class(family)[1], torch.float32).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        expected = plain(input_ids=ids)[0]
        detach_omni(prepare_omni(model, "sp=2"))
        beside = plain(input_ids=ids)[0]
        found = model(input_ids=ids)[0]
    left = [m for m in model.modules() if "forward" in vars(m)]
    return max(float((x - expected).abs().max()) for x in (beside, found)), len(left)


@pytest.mark.parametrize("family", ["falcon", "mpt", "xglm", "deberta-v2"])
def test_a_patch_comes_off_and_leaves_others_of_its_class_alone(ranks: Any, family: str) -> None:
    for difference, left in ranks(2).run(_detached, family):
        assert difference < 1e-6 and not left
