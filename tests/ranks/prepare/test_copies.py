"""Copies of a prepared model and models that share a config: each is detached alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.models import build_model, packed_batch
from tests.ranks.parity import Setting, make_model, whole
from tests.ranks.traces import left_by_us, traces, wrapped_functions


def _outputs(model) -> list[torch.Tensor]:
    model.zero_grad()
    out = model(**packed_batch((9, 6)))
    out.loss.backward()
    return [out.loss.detach(), *(whole(p.grad).clone() for p in model.parameters() if p.requires_grad)]


def _same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(got) == len(wanted) and all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def _detach_copy(name: str, lora: bool, original_first: bool) -> list[Any]:
    """Detach the copy, then the original, or the other way round; the one that is left must answer as before."""
    from hf_veomni import detach_omni, prepare_omni

    model = prepare_omni(make_model(Setting(name, lora=lora)), "")
    wanted = _outputs(model)
    before = traces(model)
    copied = copy.deepcopy(model)
    found: list[Any] = [_same(_outputs(copied), wanted)]
    first, second = (model, copied) if original_first else (copied, model)
    detach_omni(first)
    found += [not left_by_us(first), _same(_outputs(second), wanted), original_first or traces(model) == before]
    detach_omni(second)
    return [*found, not left_by_us(second), not wrapped_functions()]


@pytest.mark.parametrize("original_first", [False, True], ids=["copy_first", "original_first"])
@pytest.mark.parametrize(("name", "lora"), [("llama", False), ("llama", True), ("gpt_oss", False), ("gpt_oss", True)])
def test_a_copy_and_its_original_are_detached_alone(ranks, name, lora, original_first):
    assert ranks(1).run(_detach_copy, name, lora, original_first) == [[True] * 6]


def _copy_sharded(lora: bool) -> list[Any]:
    """Refused by name; the original goes on."""
    from hf_veomni import UnsupportedError, prepare_omni

    model = prepare_omni(make_model(Setting("llama", lora=lora)), "sp=2")
    wanted = _outputs(model)
    for make in (copy.deepcopy, torch.optim.swa_utils.AveragedModel):
        with pytest.raises(UnsupportedError, match="`AveragedModel`.*Keep averages in shards"):
            make(model)
    return [_same(_outputs(model), wanted)]


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_a_sharded_model_is_not_copied(ranks, lora):
    assert ranks(2).run(_copy_sharded, lora) == [[True], [True]]


def _shared_config(plan: str, name: str) -> list[str]:
    from hf_veomni import detach_omni, prepare_omni

    first = build_model(name)
    second = type(first)(first.config)
    assert second.config is first.config
    names = [first.config._attn_implementation]
    for step in (prepare_omni, detach_omni):
        for model in (first, second):
            step(model, plan) if step is prepare_omni else step(model)
            names.append(second.config._attn_implementation)
            if len(names) == 4:
                second(**packed_batch((9, 6))).loss.backward()  # detaching the first must not take it away
    return names


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("plan", ["", "sp=2"])
def test_models_that_share_a_config_share_the_attention_until_the_last_is_detached(ranks, plan, name):
    for names in ranks(2 if plan else 1).run(_shared_config, plan, name):
        assert names == [names[0], "omni_varlen", "omni_varlen", "omni_varlen", names[0]], names


def _shared_config_other_option(plan: str) -> None:
    from hf_veomni import prepare_omni

    first = build_model("llama")
    second = type(first)(first.config)
    prepare_omni(first, plan)
    try:
        prepare_omni(second, plan, attention="keep")
    finally:
        assert first.config._attn_implementation == "omni_varlen" and not left_by_us(second)


def test_models_that_share_a_config_cannot_select_different_attention(ranks):
    match = r"`attention` \('keep'\) must be 'auto', as for the prepared model that shares"
    ranks(2).raises(_shared_config_other_option, "sp=2", match=match)


def _deleted_with_shared_config() -> list[str]:
    from hf_veomni import detach_omni, prepare_omni

    first = build_model("llama")
    second = type(first)(first.config)
    prepare_omni(first, "")
    del first
    import gc

    gc.collect()
    names = []
    prepare_omni(second, "", attention="keep")
    names.append(second.config._attn_implementation)
    detach_omni(second)
    return [*names, second.config._attn_implementation]


def test_a_deleted_model_holds_its_config_no_longer(ranks):
    assert ranks(1).run(_deleted_with_shared_config) == [["sdpa", "sdpa"]]
