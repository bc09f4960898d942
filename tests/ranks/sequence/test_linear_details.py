"""Linear attention beside everything else: adapters, experts, generation, copies, detaching, and what is refused."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch

from tests.models import build_model, packed_batch
from tests.ranks.parity import Run, Setting, documents, make_model, relative_error
from tests.ranks.traces import changes, traces

LENGTHS = ((60, 1, 2, 70, 9), (1, 3, 90, 1, 14))


@pytest.mark.parametrize("model", ["qwen3_5", "bamba", "minimax"])
def test_lora_equals_one_rank(check, model):
    check(Setting(model, lora=True, lengths=LENGTHS), Run("sp=2", checkpointing=True))


@pytest.mark.parametrize("model", ["qwen3_next", "granitemoehybrid"])
def test_experts_beside_linear_attention_equal_one_rank(check, model):
    check(Setting(model, lengths=LENGTHS), Run("sp=2,ep=2", checkpointing=True))


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("nemotron_h", {"mamba_num_heads": 6, "n_groups": 3}),
        ("qwen3_5", {"linear_num_value_heads": 6, "linear_num_key_heads": 3}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_unevenly_shared_groups_equal_one_rank(check, model, overrides):
    """Each rank has three heads: two of one group, and one of the group that both ranks need."""
    check(Setting(model, lengths=LENGTHS, overrides=overrides), Run("sp=2"))


def test_slices_shorter_than_a_convolution_reaches_equal_one_rank(check):
    check(Setting("bamba", lengths=((1, 3),)), Run("sp=2"))


def _on_documents(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part["input_ids"], use_cache=False).logits for _, _, part in documents(batch)], dim=1)


def _left_padded(name: str) -> float:
    from hf_veomni import gather_sequence, prepare_omni

    ids = packed_batch((37,))["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    model = build_model(name).eval()
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, use_cache=False).logits
        prepare_omni(model, "sp=2")
        found = gather_sequence(model(ids, attention_mask=mask).logits, model)
    return relative_error(found[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("model", ["qwen3_next", "bamba", "minimax"])
def test_left_padded_rows_equal_the_stock_model(ranks, model):
    assert max(ranks(2).run(_left_padded, model)) < 1e-5


def _generate(name: str) -> bool:
    from hf_veomni import prepare_omni

    ids = packed_batch((7,))["input_ids"]
    model = build_model(name).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    wanted = model.generate(ids, **options)
    return torch.equal(prepare_omni(model, "sp=2").generate(ids, **options), wanted)


@pytest.mark.parametrize("model", ["qwen3_next", "bamba"])
def test_generation_finds_what_the_stock_model_finds(ranks, model):
    assert ranks(2).run(_generate, model) == [True, True]


def _functions(model: Any) -> dict[str, Any]:
    """What the modelling file calls by name."""
    names = ("causal_conv1d_fn", "torch_chunk_gated_delta_rule", "mamba2_chunk_scan")
    return {name: vars(sys.modules[type(model).__module__]).get(name) for name in names}


def _detach_and_copy(name: str) -> list[Any]:
    from hf_veomni import detach_omni, prepare_omni

    batch = packed_batch(LENGTHS[0])
    model = make_model(Setting(name)).eval()
    model.gradient_checkpointing_enable()
    before, functions, wanted = traces(model), _functions(model), _on_documents(model, batch)
    prepare_omni(model, "")
    twin = copy.deepcopy(model)
    model.train()(**batch).loss.backward()
    detach_omni(model.eval())
    with torch.no_grad():
        error = relative_error(twin(**batch).logits, wanted)
    stock = relative_error(_on_documents(model, batch), wanted)
    detach_omni(twin)
    return [error < 1e-5, stock < 1e-6, changes(before, traces(model)), _functions(model) == functions]


@pytest.mark.parametrize("model", ["qwen3_next", "bamba", "minimax"])
def test_detached_model_and_its_copy_stay_themselves(ranks, model):
    assert ranks(1).run(_detach_and_copy, model) == [[True, True, [], True]]


def _call_layer() -> None:
    from hf_veomni import prepare_omni

    model = prepare_omni(build_model("bamba"), "")
    model.model.layers[0](torch.zeros(1, 4, 64))


def test_layer_outside_of_its_model_is_refused(ranks):
    ranks(1).raises(_call_layer, match="BambaMixer was called outside of the forward of its prepared model")


def _call_with_cache() -> None:
    from transformers import DynamicCache

    from hf_veomni import prepare_omni

    model = prepare_omni(build_model("mamba2"), "sp=2")
    model(packed_batch((7,))["input_ids"], cache_params=DynamicCache(config=model.config))


def test_a_cache_of_mamba_is_refused_with_gradients_as_any_other(ranks):
    ranks(2).raises(_call_with_cache, match="cannot be combined with gradients")


def _file(function: Any) -> str:
    return getattr(getattr(function, "__code__", None), "co_filename", "")


def _replace_functions(name: str) -> float:
    """Somebody wraps a function of the modelling file after `prepare_omni`, and somebody puts the first one back."""
    from hf_veomni import prepare_omni

    batch, model = packed_batch(LENGTHS[0]), build_model(name).eval()
    wanted, space = _on_documents(model, batch), sys.modules[type(model).__module__]
    prepare_omni(model, "")
    ours = {key: value for key, value in vars(space).items() if "hf_veomni" in _file(value)}
    assert "causal_conv1d_fn" in ours
    for key, value in ours.items():
        setattr(space, key, lambda *args, _inner=value, **kwargs: _inner(*args, **kwargs))
    with torch.no_grad():
        errors = [relative_error(model(**batch).logits, wanted)]
        for key in ours:
            setattr(space, key, ours[key].__wrapped__)
        return max(*errors, relative_error(model(**batch).logits, wanted))


@pytest.mark.parametrize("model", ["qwen3_5", "bamba"])
def test_functions_that_others_replace_stay_cut(ranks, model):
    assert max(ranks(1).run(_replace_functions, model)) < 1e-5
