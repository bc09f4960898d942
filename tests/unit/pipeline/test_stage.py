"""What is refused before a model is cut, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import is_torch_version
from peft import LoraConfig, get_peft_model

from hf_veomni import ParallelPlan
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState
from hf_veomni.pipeline import plan_stages
from tests.models import build_model

_SEVERAL = pytest.mark.skipif(not is_torch_version(">=", "2.13"), reason="torch 2.11 crashes, and is refused")


def _state(plan: str) -> ParallelState:
    return ParallelState(ParallelPlan.from_string(f"{plan},dp_shard=1"), torch.device("cpu"))


def _adapted(layers: list[int]) -> Any:
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=layers)
    return get_peft_model(build_model("llama", num_hidden_layers=4), config).get_base_model()


@_SEVERAL
def test_too_few_layers_are_said_of_all_stages_that_ranks_have() -> None:
    with pytest.raises(UnsupportedError, match=r"`pp_size \* pp_stages` \(2 \* 2 = 4\) must not exceed .* \(2\)"):
        plan_stages(build_model("llama"), _state("pp=2,pp_stages=2"))


def test_a_rank_without_trained_parameters_is_refused() -> None:
    match = r"`pp_size` \(4\) leaves nothing to train on pipeline ranks 1, 2: all parameters of LlamaForCausalLM"
    with pytest.raises(UnsupportedError, match=match):
        plan_stages(_adapted([0, 3]), _state("pp=4"))


@pytest.mark.parametrize("plan", ["pp=2", "pp=2,pp_layers=1+3", pytest.param("pp=2,pp_stages=2", marks=_SEVERAL)])
def test_ranks_with_frozen_layers_are_not(plan: str) -> None:
    assert len(plan_stages(_adapted([0, 3]), _state(plan)).ranges) in (2, 4)


def test_a_model_that_is_frozen_throughout_may_be_cut_to_be_evaluated() -> None:
    assert plan_stages(build_model("llama").requires_grad_(False), _state("pp=2")).ranges == [range(1), range(1, 2)]
