"""Families of every way of being cut, called in the ways in which users call them: in fp64 against the stock model."""

from __future__ import annotations

import copy
from typing import Any

import pytest

# By which a family is cut -> rules of the plan.
FAMILIES: dict[str, dict[str, Any]] = {
    "falcon": {},
    "gptj": {},
    "deberta-v2": {},
    "roberta": {},
    "t5": {},
    "bart": {},
    "bamba": {},
    "lfm2": {},
    "qwen3_next": {},
    "glm_moe_dsa": {"*.self_attn": {"sp": "gather"}},
    "convbert": {"*.attention.self": {"sp": "gather"}},
    # Attention that could be cut, on full documents: T5's first hands a bias on, GPT-2's views what it is given.
    "t5:whole": {"*.SelfAttention": {"sp": "gather"}, "*.EncDecAttention": {"sp": "gather"}},
    "gpt2:whole": {"*.attn": {"sp": "gather"}},
}
ADAPTERS: dict[str, list[str]] = {
    "falcon": ["query_key_value"],
    "deberta-v2": ["query_proj", "value_proj"],
    "t5": ["q", "v", "o"],
    "bart": ["q_proj", "v_proj"],
    "bamba": ["in_proj", "out_proj"],
    "lfm2": ["in_proj", "out_proj"],
    "qwen3_next": ["in_proj_qkvz", "out_proj"],
    "glm_moe_dsa": ["q_b_proj", "kv_b_proj", "wq_b"],
    "convbert": ["query", "value"],
}
# Rows, tokens and the side of the padding: with fewer tokens than ranks, odd and even, one after the other.
CALLS = [(2, 13, "right"), (2, 8, "left"), (1, 1, None), (3, 6, None), (2, 3, "left")]


def _build(family: str) -> Any:
    import torch

    from tests.sweep.tiny import build, choose_class, tiny_config, use_plain_experts

    torch.manual_seed(0)
    family = family.removesuffix(":whole")
    config = tiny_config(family)
    use_plain_experts(config)
    return build(config, choose_class(family)[1], torch.float64).eval()


def _rows(family: str, rows: int, tokens: int, side: str | None) -> tuple[dict[str, Any], Any]:
    """Inputs, and which tokens count [B, S]."""
    import torch

    generator = torch.Generator().manual_seed(tokens)
    ids, mask = torch.randint(5, 80, (rows, tokens), generator=generator), torch.ones(rows, tokens, dtype=torch.long)
    few = tokens // 3
    if side == "left":
        ids[0, :few], mask[0, :few] = 1, 0
    elif side == "right":
        ids[0, -few:], mask[0, -few:] = 1, 0
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if side else {})
    if family.removesuffix(":whole") in ("t5", "bart"):
        inputs["decoder_input_ids"] = torch.randint(5, 80, (rows, tokens + 5), generator=generator)
        mask = torch.ones(rows, tokens + 5, dtype=torch.long)
    return inputs, mask


def _backward(out: Any, real: Any) -> Any:
    """A loss of every feature of every token that counts; returns them."""
    import torch

    hidden = out * real[..., None]
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (hidden * weight).sum().backward()
    return hidden.detach()


def _worst(prepared: Any, stock: Any) -> float:
    """Largest difference of a gradient, relative to its own largest entry, or to a thousandth of that of all."""
    wanted = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    found = {name: p.grad.full_tensor() for name, p in prepared.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    floor = 1e-3 * max(grad.abs().max() for grad in wanted.values())
    return max(float((found[k] - wanted[k]).abs().max() / max(wanted[k].abs().max(), floor)) for k in wanted)


def _calls(family: str, size: int, calls: list[Any], form: str) -> list[float]:
    from hf_veomni import ParallelPlan, gather_sequence, prepare_omni

    stock = _build(family)
    prepared = prepare_omni(copy.deepcopy(stock), ParallelPlan(sp_size=size, modules=FAMILIES[family]))
    if form == "checkpointing":
        prepared.train()  # the tiny models have no dropout that would act in fp64 alone
        for module in [*prepared.modules(), *stock.modules()]:
            if type(module).__name__ == "Dropout":
                module.p = 0.0
        prepared.gradient_checkpointing_enable()
    errors = []
    for call in calls:
        inputs, real = _rows(family, *call)
        if form == "embeds":
            inputs["inputs_embeds"] = stock.get_input_embeddings()(inputs.pop("input_ids")).detach()
        if form == "hidden":
            inputs["output_hidden_states"] = True
        out, own = stock(**inputs), prepared(**inputs)
        wanted, found = _backward(out[0], real), _backward(gather_sequence(own[0], prepared), real)
        errors.append(float((found - wanted).abs().max()))
        if form == "hidden":
            key = "decoder_hidden_states" if "decoder_input_ids" in inputs else "hidden_states"
            assert len(own[key]) == len(out[key])
            for state, local in zip(out[key], own[key], strict=True):
                part = -(-state.shape[1] // size)
                whole = gather_sequence(local, prepared) if local.shape[1] == part else local[:, : state.shape[1]]
                errors.append(float((whole - state).detach().abs().max()))
    return [*errors, _worst(prepared, stock)]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_other_lengths_one_after_the_other(ranks, family):
    for errors in ranks(2).run(_calls, family, 2, CALLS, "", timeout=90):
        assert max(errors) < 1e-5


# Qwen3-Next's own scan casts to fp32, which shows in gradients that are small beside the largest.
@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_next"])
def test_rows_of_other_lengths_on_more_ranks(ranks, family, size):
    for errors in ranks(size).run(_calls, family, size, CALLS, "", timeout=90):
        assert max(errors) < 1e-5


_FORMS = [
    (family, form) for family in ("falcon", "bamba", "glm_moe_dsa") for form in ("embeds", "hidden", "checkpointing")
]


@pytest.mark.parametrize(("family", "form"), [*_FORMS, ("t5", "hidden"), ("t5", "checkpointing")])
def test_forms_of_a_call(ranks, family, form):
    for errors in ranks(2).run(_calls, family, 2, [(2, 11, None)], form, timeout=60):
        assert max(errors) < 1e-5


def _beside_another(family: str) -> float:
    """What an unprepared model of the same class computes, before and after its sibling is prepared and has run."""
    import torch

    from hf_veomni import ParallelPlan, prepare_omni

    alone, sibling = _build(family), _build(family)
    inputs, _ = _rows(family, 2, 9, None)
    with torch.no_grad():
        before = alone(**inputs)[0]
    prepared = prepare_omni(sibling, ParallelPlan(sp_size=2, modules=FAMILIES[family]))
    prepared(**inputs)[0].sum().backward()
    with torch.no_grad():
        return float((alone(**inputs)[0] - before).abs().max())


def _shared_by_half() -> None:
    from hf_veomni import ParallelPlan, prepare_omni

    rules = {"encoder.block.0.layer.0.SelfAttention": {"sp": "gather"}}
    model = prepare_omni(_build("t5"), ParallelPlan(sp_size=2, modules=rules))
    model(**_rows("t5", 2, 9, None)[0])


def test_a_bias_for_modules_outside_of_the_rule_is_refused(ranks):
    ranks(2).raises(_shared_by_half, match="passed to one that is not: name all modules", timeout=60)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_model_of_the_class_stays_as_it_is(ranks, family):
    assert ranks(2).run(_beside_another, family, timeout=60) == [0.0, 0.0]


def _adapters(family: str, dora: bool) -> list[float]:
    import torch
    from peft import LoraConfig, get_peft_model

    from hf_veomni import ParallelPlan, gather_sequence, prepare_omni

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=ADAPTERS[family], use_dora=dora, init_lora_weights=False)
    stock: Any = get_peft_model(_build(family), config).double()
    prepared: Any = prepare_omni(copy.deepcopy(stock), ParallelPlan(sp_size=2, modules=FAMILIES[family]))
    inputs, real = _rows(family, 2, 11, None)
    wanted = _backward(stock(**inputs)[0], real)
    found = _backward(gather_sequence(prepared(**inputs)[0], prepared), real)
    assert any("lora" in name for name, p in prepared.named_parameters() if p.grad is not None)
    return [float((found - wanted).abs().max()), _worst(prepared, stock)]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ADAPTERS)
def test_adapters_equal_one_rank(ranks, family, dora):
    for errors in ranks(2).run(_adapters, family, dora, timeout=60):
        assert max(errors) < 1e-6
