"""Attention that activation checkpointing does not run again, on one rank; tests/ranks/sequence has its exchanges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_veomni import OmniTrainingArguments, ParallelPlan, UnsupportedError, detach_omni, prepare_omni
from tests.models import build_model, packed_batch, padded_batch


def kept(**sizes: Any) -> Any:
    return ParallelPlan(**sizes, modules={"*.self_attn": {"checkpointing": "keep"}})


class Kernels(TorchDispatchMode):
    """Counts the forwards of attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += "attention" in str(func) and "backward" not in str(func)
        return func(*args, **kwargs or {})


def gradients(model: Any, batch: dict[str, Tensor]) -> tuple[list[Tensor], int]:
    """Of one step under checkpointing, and kernels that ran in its backward."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch, use_cache=False).loss
    with Kernels() as kernels:
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], kernels.count


@pytest.mark.parametrize(
    "batch",
    [packed_batch([11, 1, 17, 8]), pytest.param(padded_batch([9, 14]), marks=pytest.mark.slow)],
    ids=["packed", "padded"],
)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_gradients_are_the_same_to_the_bit_without_a_second_attention(name: str, batch: dict[str, Tensor]) -> None:
    plain, again = gradients(prepare_omni(build_model(name), ""), batch)
    model = prepare_omni(build_model(name), kept())
    found, none = gradients(model, batch)
    assert again > 0 and none == 0
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert all("forward" not in vars(m) for n, m in detach_omni(model).named_modules() if n.endswith("self_attn"))


def test_without_checkpointing_nothing_is_kept() -> None:
    model = prepare_omni(build_model("llama"), kept())
    model(**packed_batch([5, 8]), use_cache=False).loss.backward()


def test_what_it_does_not_go_with_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"`checkpointing` \('keep'\) for '\*.mlp' has no effect"):
        prepare_omni(build_model("llama"), ParallelPlan(modules={"*.mlp": {"checkpointing": "keep"}}))
    with pytest.raises(UnsupportedError, match="attention 'eager' has none: select 'sdpa'"):
        prepare_omni(build_model("llama", attention="eager"), kept(), attention="keep")
    model: Any = prepare_omni(build_model("llama"), kept())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(UnsupportedError, match="reentrant"):
        model(**packed_batch([5, 8]), use_cache=False).loss.backward()


def test_a_second_backward_says_what_to_do() -> None:
    model: Any = prepare_omni(build_model("llama"), kept())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**packed_batch([5, 8]), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Run the forward again, or leave the rule out"):
        loss.backward()


def test_the_trainer_refuses_the_rule_without_checkpointing(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="set `activation_checkpointing=True`"):
        OmniTrainingArguments(str(tmp_path), plan=kept(), use_cpu=True)
    OmniTrainingArguments(str(tmp_path), plan=kept(), use_cpu=True, activation_checkpointing=True)
