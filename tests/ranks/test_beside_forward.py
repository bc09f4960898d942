"""Parts of a prepared model that are called beside its forward: embeddings, backbone and head. Stock gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.models import build_model
from tests.ranks.parity import relative_error, whole

FAMILIES = ["llama", "llama_tied", "gemma3", "qwen3", "gpt2"]
KEEP = {"modules": {"transformer.wte": {"fsdp": "keep"}}}


def _build(family: str) -> Any:
    if family != "gpt2":
        return build_model(family)
    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, tie_word_embeddings=False, **sizes))  # type: ignore[arg-type]


def _embeds(model: Any, ids: Tensor) -> Tensor:
    embeddings = model.get_input_embeddings()(ids)
    return model(inputs_embeds=embeddings * 1.1, labels=ids, use_cache=False).loss


def _stack(model: Any, ids: Tensor) -> Tensor:
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _after(model: Any, ids: Tensor) -> Tensor:
    """One forward before, one beside."""
    return model(ids, labels=ids, use_cache=False).loss + _embeds(model, ids)


HOW = {"embeds": _embeds, "stack": _stack, "after": _after}


def _measure(model: nn.Module, how: str) -> dict[str, Tensor]:
    """Loss and gradients. Collective on ranks."""
    ids = torch.randint(3, 60, (1, 31), generator=torch.Generator().manual_seed(3))
    loss = HOW[how](model.train(), ids)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | {name: whole(grad).clone() for name, grad in found.items()}


def _ranks(family: str, how: str, plan: Any) -> dict[str, Tensor]:
    from hf_veomni import prepare_omni

    return _measure(prepare_omni(_build(family), plan), how)


def _check(ranks: Any, family: str, how: str, plan: Any) -> None:
    expected = _measure(_build(family), how)
    for found in ranks(2).run(_ranks, family, how, plan, timeout=120):
        assert found.keys() == expected.keys()
        errors = {name: relative_error(found[name], value) for name, value in expected.items()}
        assert max(errors.values()) < 1e-5, max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("how", ["embeds", "after"])
@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_embeddings_of_ones_own_call(ranks, family, how):
    _check(ranks, family, how, "sp=2")


@pytest.mark.parametrize("how", ["embeds", "after"])
def test_embeddings_that_a_rule_makes_a_unit(ranks, how):
    _check(ranks, "gpt2", how, {"sp": 2, **KEEP})


@pytest.mark.parametrize("how", ["embeds", "after"])
def test_embeddings_sharded_with_the_root_are_refused(ranks, how):
    ranks(2).raises(_ranks, "gpt2", how, "sp=2", match=r"'transformer.wte' .* outside of .*'fsdp': 'keep'")


@pytest.mark.parametrize("family", FAMILIES)
def test_stack_and_head_of_ones_own_call(ranks, family):
    _check(ranks, family, "stack", "dp_shard=2")


def _after_a_refusal(plan: str) -> float:
    """A call that is refused leaves no trace: embeddings of the next forward are within it."""
    from hf_veomni import prepare_omni

    model = prepare_omni(_build("gpt2"), plan)
    ids = torch.arange(3, 34)[None]
    for _ in range(2):
        with pytest.raises(ValueError, match="`labels`"):
            model(ids, labels=ids[:, :5])
    return float(model(ids, labels=ids, use_cache=False).loss)


def test_a_refused_call_leaves_no_trace(ranks):
    ids = torch.arange(3, 34)[None]
    expected = float(_build("gpt2")(ids, labels=ids).loss)
    assert ranks(2).run(_after_a_refusal, "sp=2", timeout=60) == pytest.approx([expected] * 2, rel=1e-5)
