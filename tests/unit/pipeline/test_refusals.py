"""What cannot be combined with stages is refused by name, before a process group is there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_veomni import ParallelPlan
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState
from hf_veomni.pipeline import attach_border
from hf_veomni.pipeline.chain import find_chain
from hf_veomni.prepare import build_parallelize_model
from hf_veomni.trainer.stages import StagesMixin
from hf_veomni.trainer.validation import check_staged
from tests.models import build_model
from tests.unit.omni.parts import build

STAGED = ParallelPlan(pp_size=2, dp_shard_size=1)


@pytest.mark.parametrize(
    ("name", "value", "stages", "owner"),
    [
        ("log_throughput", True, 1, r"`pp_size` \(2\)"),
        ("step_report", True, 1, r"`pp_size` \(2\)"),
        ("token_budget", 512, 1, r"`pp_size` \(2\)"),
        ("log_expert_load", True, 2, r"`pp_stages` \(2\)"),
        ("router_bias_update_speed", 0.001, 2, r"`pp_stages` \(2\)"),
    ],
)
def test_arguments_of_the_trainer(name: str, value: object, stages: int, owner: str) -> None:
    plan = ParallelPlan(pp_size=2, dp_shard_size=1, pp_stages=stages)
    check_staged(SimpleNamespace(**{name: type(value)()}), plan)
    with pytest.raises(UnsupportedError, match=rf"`{name}` \({value}\) cannot be combined with {owner}"):
        check_staged(SimpleNamespace(**{name: value}), plan)
    if stages > 1:
        check_staged(SimpleNamespace(**{name: value}), STAGED)


class _Trainer(StagesMixin):
    compute_loss_func = None
    args: Any = SimpleNamespace(plan=STAGED)


class _Trl(_Trainer):
    pass


_Trl.__module__ = "trl.trainer.sft_trainer"


class _Own(_Trainer):
    def prediction_step(self, *args: Any) -> Any: ...


@pytest.mark.parametrize(
    ("trainer", "match"),
    [
        (_Trl, r"`pp_size` \(2\): _Trl is a trainer of TRL"),
        (_Own, r"`pp_size` \(2\): _Own has a `prediction_step` of its own"),
    ],
)
def test_trainers_that_look_at_logits(trainer: Any, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        object.__new__(trainer)._check_stages()


def test_what_needs_the_whole_model() -> None:
    state = ParallelState(STAGED, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"`pp_size` \(2\) needs more than shards: use prepare_omni"):
        build_parallelize_model(build_model("llama"), None, state)
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM computes its loss itself, and with `pp_size`"):
        attach_border(build_model("llama"), state)  # without our loss
    with pytest.raises(UnsupportedError, match="OmniModel"):
        find_chain(build())
