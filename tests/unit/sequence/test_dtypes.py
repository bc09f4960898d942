"""Torch's error about two dtypes says which module met them; other errors stay what they are."""

from __future__ import annotations

import pytest
import torch

from hf_veomni import prepare_omni
from tests.models import build_model

IDS = torch.arange(1, 9)[None]


@pytest.mark.parametrize("part", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"])
def test_a_module_in_another_dtype_is_named(part: str) -> None:
    model = build_model("llama", dtype=torch.bfloat16)
    model.get_submodule(part).float()
    model = prepare_omni(model)
    with pytest.raises(RuntimeError) as caught:
        model(input_ids=IDS).logits.sum()
    (note,) = caught.value.__notes__
    assert note.startswith(f"`{part}` has weights in float32 and was given bfloat16: ")
    assert "or compute under autocast (`bf16=True`)" in note


def test_other_errors_get_no_note() -> None:
    model = prepare_omni(build_model("llama"))
    with pytest.raises(RuntimeError) as caught:
        model(inputs_embeds=torch.zeros(1, 8, 7))
    assert not hasattr(caught.value, "__notes__")
