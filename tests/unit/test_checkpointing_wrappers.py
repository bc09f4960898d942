"""Several wrappers around what checkpoints a layer, put on and taken off in any order."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from hf_veomni import hf
from hf_veomni.expert.recompute import KeepingCheckpoint
from hf_veomni.loss.head import default_chunk_tokens
from hf_veomni.sequence.mixers.row import CarriedCheckpoint

WRAPPERS = (KeepingCheckpoint, CarriedCheckpoint)


@pytest.mark.parametrize("first", [0, 1])
def test_each_is_put_on_once_and_taken_off_alone(first: int) -> None:
    def checkpoint(function: Any, *args: Any) -> Any:
        return function(*args)

    layer: Any = nn.Module()
    layer._gradient_checkpointing_func = checkpoint
    for _ in range(3):  # each forward does it
        for wrapper in WRAPPERS:
            hf.wrap_checkpointing(layer, wrapper)
    outer = layer._gradient_checkpointing_func
    assert type(outer) is CarriedCheckpoint and type(outer.inner) is KeepingCheckpoint
    assert outer.inner.inner is checkpoint and outer(lambda x: x + 1, 1) == 2
    hf.restore_checkpointing(layer, WRAPPERS[first])
    left = layer._gradient_checkpointing_func
    assert type(left) is WRAPPERS[1 - first] and left.inner is checkpoint
    hf.restore_checkpointing(layer, WRAPPERS[1 - first])
    assert layer._gradient_checkpointing_func is checkpoint


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_an_accelerator_scores_more_tokens_at_once(device: str) -> None:
    """Hidden states of 8K tokens in bf16, 4,096 wide."""
    hidden = 8192 * 4096 * 2
    assert default_chunk_tokens(151_936, hidden) == 220
    assert default_chunk_tokens(151_936, hidden, device) == 883
    assert default_chunk_tokens(151_936, hidden // 64, device) == 512
    assert default_chunk_tokens(151_936, 2 * hidden, device) == 1766
    assert default_chunk_tokens(151_936, 8 * hidden, device) == 2048
    assert default_chunk_tokens(32_000, hidden, device) == 2048
