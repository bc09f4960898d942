"""What a call of a stage may not say: the message has the value, why, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_veomni import ParallelPlan
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState
from hf_veomni.pipeline.border import _Border
from tests.models import build_model


def _call(config: dict[str, Any], inputs: dict[str, Any]) -> None:
    state = ParallelState(ParallelPlan(pp_size=2, dp_shard_size=1), torch.device("cpu"))
    model: Any = build_model("llama")
    model.config.update(config)
    _Border(model, state, ())._check(model, inputs)


@pytest.mark.parametrize(
    ("config", "inputs", "match"),
    [
        ({}, {"output_attentions": True}, r"`output_attentions` \(True\) .* alone\. Leave it out, or use pp_size=1"),
        (
            {"output_hidden_states": True},
            {},
            r"`output_hidden_states` \(True, from the config\) cannot be combined with `pp_size` \(2\): a stage has .*"
            r"\. Set `model.config.output_hidden_states` to False, or use pp_size=1",
        ),
        ({}, {"return_dict": False}, r"`return_dict` \(False\) .* by their names\. Leave it out"),
        (
            {"return_dict": False},
            {},
            r"`return_dict` \(False, from the config\) .* Set `model.config.return_dict` to",
        ),
        ({}, {"inputs_embeds": torch.zeros(1, 3, 8)}, r"`inputs_embeds` \(a tensor \(1, 3, 8\)\) .* Give `input_ids`"),
    ],
)
def test_what_stages_do_not_answer_is_refused(config: dict[str, Any], inputs: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        _call(config, inputs)


def test_what_a_call_may_say_is_not() -> None:
    _call({"output_hidden_states": True}, {"output_hidden_states": False, "return_dict": True, "inputs_embeds": None})
