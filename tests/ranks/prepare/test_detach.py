"""Several models in one process do not disturb each other, and `detach_omni` leaves the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import ZOO, build_model, packed_batch, padded_batch
from tests.ranks.parity import Run, Setting, compute_reference, make_batches, make_model, relative_error, whole
from tests.ranks.traces import changes, left_by_us, traces, wrapped_functions

MODELS = ["llama", "gemma2", "gpt_oss", "deepseek_v3", "cohere"]


def _stock_outputs(model) -> dict[str, Any]:
    """Logits, loss and gradients on an unpacked batch, which needs nothing of ours."""
    model.zero_grad()
    out = model(**padded_batch((23, 37)), use_cache=False)
    out.loss.backward()
    grads = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


def _differences(got: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    assert got.keys() == wanted.keys()
    return [name for name, value in wanted.items() if not torch.equal(got[name], value)]


def _detach_alone(name: str, lora: bool) -> list[str]:
    """In a world of one rank nothing is sharded, so everything must be as it was."""
    from hf_veomni import detach_omni, prepare_omni

    model = make_model(Setting(name, lora=lora))
    before, wanted = traces(model), _stock_outputs(model)
    prepare_omni(model, "")
    assert traces(model) != before
    model(**packed_batch((9, 6))).loss.backward()
    assert detach_omni(model) is model
    return changes(before, traces(model)) + wrapped_functions() + _differences(_stock_outputs(model), wanted)


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("model", MODELS)
def test_detached_model_is_the_stock_model(ranks, model, lora):
    assert ranks(1).run(_detach_alone, model, lora) == [[]]


def _detach_sharded(name: str, plan: str) -> list[str]:
    from hf_veomni import detach_omni, prepare_omni

    wanted = _stock_outputs(build_model(name))
    model = build_model(name)
    before = traces(model)
    prepare_omni(model, plan)
    model(**packed_batch((9, 6))).loss.backward()
    detach_omni(model)
    # The class, hooks and attributes of FSDP are there to stay.
    stay = [key for key in before if key[-1] in ("loss", "attention")]
    after = traces(model)
    left = left_by_us(model) + wrapped_functions()
    left += changes({key: before[key] for key in stay}, {key: after[key] for key in stay})
    got = _stock_outputs(model)
    far = [key for key, value in wanted.items() if relative_error(got[key], value) > 1e-5]
    return left + far + [key for key in ("logits", "loss") if not torch.equal(got[key], wanted[key])]


@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
@pytest.mark.parametrize("model", MODELS)
def test_detached_sharded_model_computes_as_the_stock_model(ranks, model, plan):
    assert ranks(2).run(_detach_sharded, model, plan) == [[], []]


def _fail_at_the_end(setting: Setting, plan: str) -> list[str]:
    """What the last step of preparing leaves behind where it raises, beside the class, hooks and shards of FSDP."""
    from hf_veomni import prepare, prepare_omni

    def fail(*args: Any) -> None:
        raise RuntimeError("the last step")

    model = make_model(setting)
    before, original = traces(model), prepare.attach_stock_calls
    prepare.attach_stock_calls = fail
    try:
        with pytest.raises(RuntimeError, match="the last step"):
            prepare_omni(model, plan)
    finally:
        prepare.attach_stock_calls = original
    found = left_by_us(model) + wrapped_functions()
    return found if plan else found + changes(before, traces(model))


def test_a_failure_at_the_end_of_preparing_leaves_a_stock_model(ranks):
    assert ranks(1).run(_fail_at_the_end, Setting("qwen3_moe", lora=True), "") == [[]]


def test_a_failure_at_the_end_leaves_nothing_beside_shards(ranks):
    assert ranks(2).run(_fail_at_the_end, Setting("llama"), "sp=2,overlap=chunks") == [[], []]


def _prepare_again(path: str) -> list[float]:
    from hf_veomni import detach_omni, prepare_omni
    from hf_veomni.hf import base_model
    from tests.ranks.parity import measure

    setting = Setting("llama")
    model = detach_omni(prepare_omni(make_model(setting), ""))
    assert base_model(model) is model
    prepare_omni(model, "", chunked_loss=False)
    errors = measure(model, setting, Run(""), path)
    return [errors["loss"], errors["logits"], errors["gradient"]]


def test_detached_model_can_be_prepared_again(ranks, tmp_path):
    compute_reference(Setting("llama"), tmp_path / "reference.pt")
    (errors,) = ranks(1).run(_prepare_again, str(tmp_path / "reference.pt"))
    assert max(errors) < 1e-5, errors


def _side_by_side(first: tuple[Setting, str, str], second: tuple[Setting, str, str]) -> list[Any]:
    """Forward A, B and a stock model, backward B, then A. Returns what changed in the stock model, and errors."""
    from hf_veomni import detach_omni, get_parallel_state, prepare_omni
    from tests.ranks.parity import Errors, compare_gradients

    stock = build_model("llama_tied")
    stock_before = _stock_outputs(stock)
    prepared, losses = [], []
    for setting, plan, _ in (first, second):
        model = prepare_omni(make_model(setting), plan)
        model.gradient_checkpointing_enable()
        prepared.append(model)
    for model, (setting, _, _) in zip(prepared, (first, second), strict=True):
        losses.append(model(**make_batches(setting)[get_parallel_state(model).dp_rank][0]).loss)
    changed = _differences(_stock_outputs(stock), stock_before)
    for loss in reversed(losses):
        loss.backward()
    worst = []
    for model, (_, _, path) in zip(prepared, (first, second), strict=True):
        errors = Errors()
        compare_gradients(model, torch.load(path), errors)
        worst.append(errors.gradient)
    detach_omni(prepared[0])  # the second must go on
    setting, _, path = second
    prepared[1].zero_grad()
    batch = make_batches(setting)[get_parallel_state(prepared[1]).dp_rank][0]
    prepared[1](**batch).loss.backward()
    errors = Errors()
    compare_gradients(prepared[1], torch.load(path), errors)
    return [changed, *worst, errors.gradient]


@pytest.mark.parametrize("pair", [("llama", "gemma2"), ("gpt_oss", "llama_uneven"), ("llama", "qwen3_sliding")])
@pytest.mark.parametrize("plans", [("sp=2", "dp_shard=2"), ("sp=2", "sp=2"), ("dp_replicate=2", "sp=2")])
def test_two_prepared_models_and_a_stock_one_in_one_process(ranks, tmp_path, pair, plans):
    assert set(pair) <= ZOO.keys()
    sides = []
    for index, (name, plan) in enumerate(zip(pair, plans, strict=True)):
        setting = Setting(name, dp_size=1 if plan == "sp=2" else 2)
        path = tmp_path / f"{index}.pt"
        compute_reference(setting, path)
        sides.append((setting, plan, str(path)))
    for changed, *errors in ranks(2).run(_side_by_side, *sides):
        assert changed == []
        assert max(errors) < 1e-5, errors
