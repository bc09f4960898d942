"""Adapters on tied embeddings and heads, and trained parameters of several dtypes: same gradients as PEFT alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from tests.ranks.parity import relative_error, whole

_IDS: dict[str, Any] = dict(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def _stock(family: str, tied: bool = True, **more: Any) -> nn.Module:
    """A tiny stock model with dropout off; the same in every process."""
    torch.manual_seed(1)
    more = {"tie_word_embeddings": tied, **_IDS, **more}
    if family == "llama":
        model = AutoModelForCausalLM.from_config(LlamaConfig(**_SIZES, **more))
    elif family == "gemma":
        model = AutoModelForCausalLM.from_config(GemmaConfig(head_dim=8, **_SIZES, **more))
    elif family == "gpt2":
        drop = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4, **drop, **more))
    else:
        sizes = dict(d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2, dropout_rate=0.0)
        config = T5Config(decoder_start_token_id=0, feed_forward_proj="gated-gelu", **sizes, **more)
        model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    return model


def _adapted(model: nn.Module, **lora: Any) -> nn.Module:
    """With an adapter whose trained parameters are all random."""
    wrapped = get_peft_model(model, LoraConfig(r=4, **lora))  # type: ignore[arg-type]
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return wrapped


def _batch(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (1, 31), generator=torch.Generator().manual_seed(3))
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "labels": ids[:, :20].clone(), "decoder_input_ids": ids[:, :20]}
    return {"input_ids": ids, "labels": ids.clone()}


def _measure(model: nn.Module) -> dict[str, Tensor]:
    """Loss, gradients and logits. Collective on ranks."""
    from hf_veomni import gather_sequence

    model.train()
    loss = model(**_batch(model), use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    with torch.no_grad():
        logits = model(**_batch(model), use_cache=False).logits
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        logits = gather_sequence(logits, model)
    return {"loss": loss.detach(), "logits": logits} | {name: whole(grad).clone() for name, grad in found.items()}


def _ranks(make: str, arguments: dict[str, Any], plan: Any) -> dict[str, Tensor]:
    from hf_veomni import prepare_omni

    return _measure(prepare_omni(globals()[make](**arguments), plan))


def _check(ranks: Any, make: str, arguments: dict[str, Any], plan: Any) -> None:
    expected = _measure(globals()[make](**arguments))
    for found in ranks(2).run(_ranks, make, arguments, plan, timeout=120):
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        errors = {name: relative_error(found[name], value) for name, value in expected.items()}
        assert max(errors.values()) < 1e-5, max(errors, key=lambda name: errors[name])
        assert all(found[name].dtype == value.dtype for name, value in expected.items() if name != "loss")


# ---------------------------------------------------------------- one weight, reached through two modules

_TARGETS: dict[str, dict[str, Any]] = {
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "both": dict(target_modules=["embed_tokens", "lm_head"]),
    "DoRA": dict(target_modules=["q_proj", "lm_head"], use_dora=True),
    "biases": dict(target_modules=["lm_head"], bias="all"),
    "copied head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[1, 5, 9]),
    "tokens of both": dict(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5, 9], "lm_head": [1, 5, 9]}
    ),
}


def _lora(family: str, target: str, tied: bool = True) -> nn.Module:
    return _adapted(_stock(family, tied), **_TARGETS[target])


@pytest.mark.parametrize("target", _TARGETS)
@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
def test_adapters_on_a_tied_weight(ranks, target, plan):
    _check(ranks, "_lora", dict(family="llama", target=target), plan)


@pytest.mark.parametrize("target", ["head", "copied head", "tokens"])
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_on_a_head_that_a_rule_names(ranks, target, tied):
    plan = {"sp": 2, "modules": {"lm_head": {"fsdp": "keep"}}}
    _check(ranks, "_lora", dict(family="llama", target=target, tied=tied), plan)


def _lora_elsewhere(family: str) -> nn.Module:
    targets = {"gemma": ["q_proj", "lm_head"], "gpt2": ["c_attn", "lm_head"], "t5": ["q", "lm_head"]}
    return _adapted(_stock(family), target_modules=targets[family])


@pytest.mark.parametrize("family", ["gemma", "gpt2", "t5"])
def test_an_adapter_on_the_tied_head_of_other_families(ranks, family):
    _check(ranks, "_lora_elsewhere", dict(family=family), "sp=2")


def _tied_adapters(target: str) -> None:
    from hf_veomni import prepare_omni

    targets = ["q_proj", "lm_head"] if target == "head" else ["embed_tokens", "lm_head"]
    prepare_omni(_adapted(_stock("llama"), target_modules=targets, ensure_weight_tying=True), "sp=2")


@pytest.mark.parametrize("target", ["head", "both"])
def test_adapters_that_are_views_of_each_other_are_refused(ranks, target):
    ranks(2).raises(_tied_adapters, target, match="two views of the same memory.*`ensure_weight_tying`")


# ---------------------------------------------------------------- several dtypes in one unit


def _mixed(kind: str) -> nn.Module:
    """fp64 with some trained parameters in fp32, so that nothing but a wrong reduction shows."""
    if kind == "biases":  # fp32 adapters, fp64 biases
        model = _stock("llama", attention_bias=True, mlp_bias=True).double()
        return _in_fp32(_adapted(model, target_modules=["q_proj", "down_proj"], bias="all"), "lora_")
    if kind == "norm beside adapters":
        model = _stock("llama", tied=False).double()
        return _in_fp32(_adapted(model, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"]), "lora_")
    if kind == "output matrices":  # as T5 keeps them under bf16
        return _in_fp32(_stock("t5").double(), ".wo.")
    model = _stock("llama").double()
    return _in_fp32(model, "model.norm" if kind == "final norm" else "layernorm")


def _in_fp32(model: nn.Module, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize("kind", ["biases", "norm beside adapters", "output matrices", "final norm", "layer norms"])
@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
def test_trained_parameters_of_several_dtypes(ranks, kind, plan):
    _check(ranks, "_mixed", dict(kind=kind), plan)


def _inseparable() -> None:
    from hf_veomni import prepare_omni

    model = _stock("llama", tied=False)
    model.model.norm.register_parameter("bias", nn.Parameter(torch.zeros(32, dtype=torch.bfloat16)))
    prepare_omni(model, "sp=2")


def test_one_module_of_two_dtypes_is_refused(ranks):
    ranks(2).raises(_inseparable, match="trained in several dtypes.*no modules separate them")
