"""The methods of PEFT beside plain LoRA, and several adapters: same gradients as PEFT alone, or refused by name."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.ranks.parity import relative_error
from tests.ranks.prepare.test_peft_units import _measure, _stock

_TWO, _MLP = ["q_proj", "v_proj"], ["q_proj", "down_proj"]
_LORA: dict[str, dict[str, Any]] = {
    "rsLoRA": dict(use_rslora=True),
    "DoRA of several ranks": dict(use_dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}),
    "biases of its own": dict(lora_bias=True),
    "copied MLP": dict(target_modules=["q_proj"], modules_to_save=["mlp"]),
    "parameters": dict(target_modules=["v_proj"], target_parameters=["mlp.up_proj.weight"]),
    "PiSSA": dict(init_lora_weights="pissa"),
    "OLoRA": dict(init_lora_weights="olora"),
    "replicated layers": dict(layer_replication=[[0, 2], [0, 2]]),
}
METHODS: dict[str, Any] = {name: LoraConfig(r=4, **{"target_modules": _MLP, **more}) for name, more in _LORA.items()}
METHODS |= {
    "LoHa": peft.LoHaConfig(r=4, target_modules=_MLP),
    "LoKr": peft.LoKrConfig(r=4, target_modules=_MLP),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": peft.OFTConfig(oft_block_size=4, target_modules=_TWO),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=_TWO),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "VB-LoRA": peft.VBLoRAConfig(r=2, num_vectors=20, vector_length=8, topk=2, target_modules=_TWO),
    "FourierFT": peft.FourierFTConfig(n_frequency=20, target_modules=_TWO),
    "HRA": peft.HRAConfig(r=4, target_modules=_MLP),
    "RandLora": peft.RandLoraConfig(r=4, target_modules=_TWO),
    "trained tokens": peft.TrainableTokensConfig(token_indices=[1, 5]),
}


def _random(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and (parameter.requires_grad or "lora_" in name):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def _method(name: str) -> nn.Module:
    return _random(get_peft_model(_stock("llama"), METHODS[name]))  # type: ignore[arg-type]


def _two_adapters() -> Any:
    model: Any = get_peft_model(_stock("llama"), LoraConfig(r=4, target_modules=_MLP))  # type: ignore[arg-type]
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj", "o_proj"]))
    return _random(model)


def _switch(model: Any, kind: str) -> None:
    if kind == "other":
        model.set_adapter("other")
    elif kind == "both":
        model.base_model.set_adapter(["default", "other"])
    elif kind == "deleted":
        model.delete_adapter("other")


def _on_ranks(name: str, plan: str) -> dict[str, Tensor]:
    from hf_veomni import prepare_omni

    return _measure(prepare_omni(_method(name), plan))


def _switched(kind: str, before: bool, plan: str) -> dict[str, Tensor]:
    from hf_veomni import prepare_omni

    model = _two_adapters()
    if before:
        _switch(model, kind)
    model = prepare_omni(model, plan)
    if not before:
        _switch(model, kind)
    return _measure(model)


def _assert_same(ranks: Any, expected: dict[str, Tensor], function: Any, *arguments: Any) -> None:
    for found in ranks(2).run(function, *arguments, timeout=120):
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        for name, value in expected.items():
            assert relative_error(found[name], value) < 1e-5, name


@pytest.mark.parametrize("name", METHODS)
def test_methods_equal_one_process(ranks, name):
    plan = "sp=2" if list(METHODS).index(name) % 2 else "dp_shard=2"
    _assert_same(ranks, _measure(_method(name)), _on_ranks, name, plan)


@pytest.mark.parametrize("kind", ["default", "other", "both", "deleted"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_several_adapters_equal_one_process(ranks, kind, before):
    model = _two_adapters()
    _switch(model, kind)
    _assert_same(ranks, _measure(model), _switched, kind, before, "sp=2" if before else "dp_shard=2")


def _osf() -> None:
    from hf_veomni import prepare_omni

    prepare_omni(get_peft_model(_stock("llama"), peft.OSFConfig(target_modules=_TWO)), "dp_shard=2")  # type: ignore


def test_a_method_that_hooks_gradients_is_refused(ranks):
    ranks(2).raises(_osf, match="has a hook on its gradient .*peft's OSF")


def _hooked(kind: str, before: bool) -> None:
    from hf_veomni import prepare_omni

    model: Any = _stock("llama")
    model = model if before else prepare_omni(model, "sp=2")
    weight = model.get_input_embeddings().weight
    if kind == "gradient":
        weight.register_hook(lambda gradient: 2 * gradient)
    else:
        weight.register_post_accumulate_grad_hook(lambda parameter: None)
    _measure(prepare_omni(model, "sp=2") if before else model)


@pytest.mark.parametrize("kind", ["gradient", "accumulated"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_hooks_on_gradients_are_refused(ranks, kind, before):
    ranks(2).raises(_hooked, kind, before, match="'model.embed_tokens.weight' has a hook on its gradient")
