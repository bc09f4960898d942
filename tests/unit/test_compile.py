"""Compilation by layer says where it has no effect."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from hf_veomni import compile_layers
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
