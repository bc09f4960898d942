"""Adapters on towers, and towers and projectors that PEFT trains and saves in full, under sequence parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.omni_models import build
from tests.ranks.modality.test_towers_families import ALL, NONE, _row, _step
from tests.ranks.parity import relative_error, whole

_TEXT = r".*(language_model|text_model).*\.(q_proj|v_proj)"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adapters": ("qwen3_vl", {"target_modules": r".*visual.*\.(qkv|linear_fc1)|" + _TEXT}),
    "projector": ("qwen2_5_vl", {"target_modules": _TEXT, "modules_to_save": ["merger"]}),
    "tower": ("internvl", {"target_modules": _TEXT, "modules_to_save": ["vision_tower"]}),
    "sounds": ("voxtral", {"target_modules": r".*audio_tower.*\.(q_proj|fc1)|" + _TEXT}),
}


def _compare(case: str, plan: str, rows: list[Any]) -> dict[str, float]:
    from peft import LoraConfig, get_peft_model

    from hf_veomni import get_parallel_state, prepare_omni

    family, options = CASES[case]
    torch.manual_seed(1)
    model = get_peft_model(build(family), LoraConfig(r=4, init_lora_weights=False, **options)).train()
    data = [[_row(family, i, part)] for i, part in enumerate(rows)]
    losses = [_step(model, batches) for batches in data]
    wanted = {n: p.grad / len(data) for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad(set_to_none=True)
    prepare_omni(model, plan)
    rank = get_parallel_state(model).dp_rank
    loss = _step(model, data[rank])
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name: p for name, p in wanted.items() if not name.endswith(("k_proj.bias", "attn.qkv.bias"))}
    assert wanted.keys() <= found.keys() and any("language_model" not in name for name in wanted)
    errors = {name: relative_error(found[name], gradient) for name, gradient in wanted.items()}
    worst = max(errors, key=errors.__getitem__)
    return {"loss": relative_error(loss, losses[rank]), f"gradients ({worst})": errors[worst]}


@pytest.mark.parametrize("case", CASES)
def test_adapters_equal_one_rank(ranks: Any, case: str) -> None:
    for errors in ranks(2).run(_compare, case, "sp=2", [ALL], timeout=60):
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("case", CASES)
def test_adapters_equal_one_rank_beside_a_row_of_words(ranks: Any, case: str) -> None:
    for errors in ranks(2).run(_compare, case, "dp_shard=2", [ALL, NONE], timeout=60):
        assert max(errors.values()) < 1e-5, errors
