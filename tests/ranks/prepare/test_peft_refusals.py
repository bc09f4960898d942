"""PEFT methods that a plan cannot carry say so by name; those that it can have the gradients of PEFT alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    LoraConfig,
    PeftConfig,
    XLoraConfig,
    get_peft_model,
)
from torch import Tensor, nn

from tests.ranks.parity import relative_error
from tests.ranks.training import tiny_model

_INVOCATION = [7, 8]
_LORA = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def _config(kind: str) -> PeftConfig:
    match kind:
        case "ADALORA":
            return AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
        case "ADAPTION_PROMPT":
            return AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
        case "XLORA":
            return XLoraConfig(hidden_size=32, adapters={"first": "nowhere"}, task_type="CAUSAL_LM")
    return LoraConfig(alora_invocation_tokens=_INVOCATION if kind == "aLoRA" else None, **_LORA)  # type: ignore


def _model(kind: str) -> nn.Module:
    model: Any = tiny_model()
    if kind == "XLORA":  # which wants adapters in files
        model = get_peft_model(model, _config("LORA"))
        model.peft_config["default"].peft_type = "XLORA"
    else:
        model = get_peft_model(model, _config(kind))
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.1)
    return model


def _prepared(kind: str, plan: str, packed: bool = False) -> Tensor:
    from hf_veomni import prepare_omni

    model = prepare_omni(_model(kind), plan)
    return model(**_packed() if packed else _row()).loss.detach()


def _row() -> dict[str, Tensor]:
    """One document that invokes the adapter in its middle."""
    ids = torch.randint(10, 61, (1, 23), generator=torch.Generator().manual_seed(2))
    ids[0, 11:13] = torch.tensor(_INVOCATION)
    return {"input_ids": ids, "labels": ids.clone()}


def _packed() -> dict[str, Tensor]:
    return {**_row(), "position_ids": torch.cat([torch.arange(9), torch.arange(14)])[None]}


@pytest.mark.parametrize("kind", ["ADALORA", "ADAPTION_PROMPT", "XLORA"])
@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
def test_methods_that_call_past_hooks(ranks, kind, plan):
    ranks(2).raises(_prepared, kind, plan, match=f"PEFT method {kind} .adapter 'default'. calls the forward.*use LoRA")


def test_activated_lora_over_a_cut_row(ranks):
    ranks(2).raises(_prepared, "aLoRA", "sp=2", match="`alora_invocation_tokens` of adapter 'default' counts tokens")


def test_activated_lora_in_packed_rows(ranks):
    for world, plan in ((1, ""), (2, "dp_shard=2")):
        ranks(world).raises(_prepared, "aLoRA", plan, True, match="activated LoRA counts tokens from the end")


@pytest.mark.parametrize(("kind", "world"), [("aLoRA", 2), ("aLoRA", 1), ("ADALORA", 1)])
def test_what_is_not_refused_is_that_of_one_process(ranks, kind, world):
    expected = _model(kind)(**_row(), use_cache=False).loss
    for loss in ranks(world).run(_prepared, kind, ""):
        assert relative_error(loss, expected.detach()) < 1e-5
