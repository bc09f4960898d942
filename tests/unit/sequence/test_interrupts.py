"""Ctrl-C in a forward, after which a notebook goes on: torch calls no hooks after it, not even those of always."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_veomni import detach_omni, prepare_omni
from hf_veomni.context import current
from tests.models import build_model, packed_batch


def interrupt(model: nn.Module, inside: str, batch: dict[str, Tensor]) -> None:
    """A forward that is interrupted before `inside` runs."""

    def stop(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_submodule(inside).register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()


def _step(model: Any, train: bool) -> list[Tensor]:
    """Loss and gradients, or logits."""
    model.train(train)
    with torch.set_grad_enabled(train):
        out = model(**packed_batch((4, 9)))
    if not train:
        return [out.logits]
    model.zero_grad()
    out.loss.backward()
    return [out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("inside", ["model.layers.1", "model.embed_tokens", "lm_head"])
def test_an_interrupted_forward_leaves_nothing_behind(inside: str, train: bool) -> None:
    model: Any = prepare_omni(build_model("qwen3_moe"))
    interrupt(model.train(train), inside, packed_batch((5, 6, 7)))
    now = current()
    assert (now.call, now.row, now.documents, now.ids, now.router_loss, now.entries) == (None,) * 5 + ((),)
    expected = _step(prepare_omni(build_model("qwen3_moe")), train)
    assert all(torch.equal(mine, its) for mine, its in zip(_step(model, train), expected, strict=True))


def test_copies_have_calls_of_their_own_and_detach_takes_them_off() -> None:
    model: Any = prepare_omni(build_model("llama"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    batch = packed_batch((5, 6))
    assert not other(**batch).logits.any() and model(**batch).logits.any()
    detach_omni(other)
    assert not any("_call_impl" in vars(module) for module in other.modules())
    interrupt(model, "model.layers.0", batch)
    assert not current().entries
