"""The sweep over the families counts as refused what hf_veomni says it does not support, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_veomni
from tests.sweep import training
from tests.sweep.family import _sweep
from tests.sweep.stages import depth


def _raiser(error: Exception):
    def raises(*args, **kwargs):
        raise error

    return raises


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (hf_veomni.UnsupportedError("Not here: use sp_size=1."), "refused", "Not here: use sp_size=1."),
        (ValueError("something of torch's own"), "crashes", "ValueError: something of torch's own"),
        (RuntimeError("boom"), "crashes", "RuntimeError: boom"),
    ],
)
def test_only_what_is_unsupported_is_refused(monkeypatch, error, outcome, reason):
    monkeypatch.setattr(hf_veomni, "prepare_omni", _raiser(error))
    record = _sweep("llama", "sp=1", torch.float32)
    assert (record.outcome, record.reason) == (outcome, reason)


@pytest.mark.parametrize(
    ("error", "outcome"), [(hf_veomni.UnsupportedError("no"), "refused"), (ValueError("no"), "crashes")]
)
def test_so_does_the_first_call(monkeypatch, error, outcome):
    class Failing(nn.Module):
        def forward(self, **inputs):
            raise error

    monkeypatch.setattr(hf_veomni, "prepare_omni", lambda *_: Failing())
    assert _sweep("llama", "sp=1", torch.float32).outcome == outcome


def test_trainer_tells_a_refusal_from_a_crash(monkeypatch):
    monkeypatch.setattr(training, "_run", _raiser(hf_veomni.UnsupportedError("not here")))
    assert training.omni_logs("llama", "sp=2") == "not here"
    monkeypatch.setattr(training, "_run", _raiser(ValueError("torch's own")))
    with pytest.raises(ValueError, match="torch's own"):
        training.omni_logs("llama", "sp=2")


def test_each_stage_gets_a_layer_beside_those_of_the_first() -> None:
    """Of Qwen3-VL the first stage has three, which take features of its encoder. T5 is refused, whatever it has."""
    assert [depth(name, stages) for name in ("qwen3_vl", "llama", "t5") for stages in (2, 4)] == [4, 6, 2, 4, 2, 4]
