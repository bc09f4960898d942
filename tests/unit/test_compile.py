"""Compilation by layer says where it has no effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.utils import logging

from hf_veomni import compile_layers, prepare_omni
from tests.models import build_model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_beside_checkpointing_it_warns(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(logging.logging.Logger, "warning", lambda self, message, *args: messages.append(message))
    model = build_model("llama")
    if checkpointing:
        model.gradient_checkpointing_enable()
    compile_layers(model, backend="eager")
    assert ["not compiled" in message for message in messages if "compile" in message] == [True] * checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["auto", "keep"])
def test_a_whole_model_may_be_compiled_too(attention: str) -> None:
    """Of padded rows: the mask is known on the host, and no graph takes such a tensor."""
    ids = torch.arange(3, 27).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    model: Any = prepare_omni(build_model("llama"), "sp=1", attention=attention)
    compiled = torch.compile(model, backend="aot_eager")
    wanted, found = (run(input_ids=ids, attention_mask=mask, labels=ids) for run in (model, compiled))
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.logits, wanted.logits)
