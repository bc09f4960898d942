"""Plans with two sequences in flight that are refused before anything is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hf_veomni.pairs
from hf_veomni import ParallelPlan, ParallelState, UnsupportedError
from hf_veomni.fsdp import check_overlap

MODEL = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def _state(world_size: int, **plan: Any) -> ParallelState:
    return ParallelState(plan=ParallelPlan(**plan).resolve(world_size), device=torch.device("cpu"))


def test_one_rank_has_nothing_to_overlap() -> None:
    with pytest.raises(ValueError, match=r"`overlap` \('pairs'\) has no effect on one rank.*leave it out"):
        check_overlap(MODEL, _state(1, overlap="pairs"))
    check_overlap(MODEL, _state(1))
    check_overlap(MODEL, _state(2, overlap="pairs"))


@pytest.mark.parametrize("value", ["none", "chunks"])
def test_a_rule_by_module_is_refused(value: str) -> None:
    rules = {"lm_head": {"fsdp": "keep"}, "*.experts": {"overlap": value}}
    with pytest.raises(UnsupportedError, match=rf"`overlap` \('{value}'\) for '\*.experts'.*leave one of the two out"):
        check_overlap(MODEL, _state(2, sp_size=2, overlap="pairs", modules=rules))


def test_a_missing_greenlet_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_veomni.pairs, "greenlet", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hf-veomni\[overlap\]'.*leave `overlap` out"):
        check_overlap(MODEL, _state(2, overlap="pairs"))
    check_overlap(MODEL, _state(2))


@pytest.mark.parametrize(("name", "said"), [("1", "'1', which is compiled"), ("", "'Sequential', which is compiled")])
def test_a_compiled_module_is_refused(name: str, said: str) -> None:
    """Its hooks would not be called once for both."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.get_submodule(name).compile(backend="eager")
    with pytest.raises(UnsupportedError, match=f"`overlap`.*{said}.*leave `compile` out"):
        check_overlap(model, _state(2, overlap="pairs"))
    check_overlap(model, _state(2, overlap="chunks"))
