"""Attaching the loss: which models, when the head computes logits, and how everything comes off again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_veomni.loss import CausalLMLoss, LazyLogits, attach_chunked_loss, chunked_evaluation
from tests.models import VOCABULARY, build_model, padded_batch

BATCH = padded_batch([11, 8]) | {"use_cache": False}


def test_detach_puts_everything_back():
    model = build_model("llama")
    before = model(**BATCH).loss
    detach = attach_chunked_loss(model)
    assert isinstance(model.loss_function, CausalLMLoss)
    assert type(model(**BATCH).logits) is LazyLogits
    detach()
    detach()
    assert "forward" not in vars(model.lm_head) and "_loss_function" not in vars(model)
    assert model.loss_function is ForCausalLMLoss
    out = model(**BATCH)
    assert type(out.logits) is Tensor and torch.equal(out.loss, before)


def test_what_was_set_on_the_instance_comes_back():
    model = build_model("llama")
    model.loss_function = ForCausalLMLoss
    plain = model.lm_head.forward
    model.lm_head.forward = own = lambda hidden: plain(hidden) * 2
    full = attach_chunked_loss(model, chunked=False)
    expected = model(**BATCH).loss
    full()
    detach = attach_chunked_loss(model, chunk_tokens=4)
    out = model(**BATCH)
    assert type(out.logits) is LazyLogits
    torch.testing.assert_close(out.loss, expected)
    detach()
    assert model.lm_head.forward is own and vars(model)["_loss_function"] is ForCausalLMLoss


def test_a_head_wrapped_by_somebody_else_meanwhile_keeps_the_wrapper():
    model = build_model("llama")
    detach = attach_chunked_loss(model)
    ours = model.lm_head.forward
    model.lm_head.forward = theirs = lambda hidden: ours(hidden)
    model.loss_function = other = lambda **_: 0
    detach()
    assert model.lm_head.forward is theirs and model.loss_function is other
    assert type(model(input_ids=BATCH["input_ids"]).logits) is Tensor


def test_logits_are_real_without_training_or_gradients():
    model = build_model("llama")
    attach_chunked_loss(model)
    assert type(model(**BATCH).logits) is LazyLogits
    with torch.no_grad():
        assert type(model(**BATCH).logits) is Tensor
    model.eval()
    assert type(model(**BATCH).logits) is Tensor
    assert model.generate(BATCH["input_ids"][:1], max_new_tokens=2, do_sample=False).shape == (1, 13)


def test_without_labels_lazy_logits_become_logits_when_used():
    model = build_model("llama")
    expected = model(input_ids=BATCH["input_ids"]).logits
    attach_chunked_loss(model)
    torch.testing.assert_close(model(input_ids=BATCH["input_ids"]).logits.exp(), expected.exp())


def test_lean_keyword_keeps_the_logits():
    model = build_model("llama")
    expected = model(**BATCH).loss
    attach_chunked_loss(model, chunked=False)
    out = model(**BATCH)
    assert type(out.logits) is Tensor
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_lean_evaluation(gradients):
    model = build_model("llama").eval()
    expected = model(**BATCH).loss
    attach_chunked_loss(model, chunk_tokens=4)
    with torch.set_grad_enabled(gradients), chunked_evaluation(model):
        out = model(**BATCH)
        assert type(out.logits) is LazyLogits and out.logits.recipe.real is None
        torch.testing.assert_close(out.loss, expected)
        assert out.loss.requires_grad is gradients
    assert type(model(**BATCH).logits) is Tensor


def test_lean_evaluation_needs_the_loss():
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM has no loss attached: call `attach_chunked_loss"),
        chunked_evaluation(build_model("llama")),
    ):
        pass


def test_peft_model_is_taken_by_its_base():
    model = get_peft_model(build_model("llama"), LoraConfig(target_modules=["q_proj", "lm_head"]))
    expected = model(**BATCH).loss
    detach = attach_chunked_loss(model, chunk_tokens=4)
    out = model(**BATCH)
    assert type(out.logits) is LazyLogits and isinstance(model.get_base_model().loss_function, CausalLMLoss)
    torch.testing.assert_close(out.loss, expected)
    detach()
    assert type(model(**BATCH).logits) is Tensor


def test_a_deep_copy_uses_its_own_head_and_settings():
    model = build_model("llama")
    attach_chunked_loss(model, chunk_tokens=4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    other.loss_function.label_smoothing = 0.5
    loss = other(**BATCH).loss
    torch.testing.assert_close(loss, torch.tensor(float(VOCABULARY)).log())
    loss.backward()
    assert other.lm_head.weight.grad is not None and model.lm_head.weight.grad is None
    assert model.loss_function.label_smoothing == 0
    assert model(**BATCH).loss > loss


class _TwoHeads(nn.Module):
    """Calls the head twice, as multi-token prediction does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        later = torch.roll(labels, -1, dims=1)
        losses = [
            self.model.loss_function(self.model.lm_head(h), y, VOCABULARY)
            for h, y in ((hidden, labels), (hidden.tanh(), later))
        ]
        return losses[0] + 0.3 * losses[1]


def test_several_calls_of_the_head():
    model = build_model("stablelm", dtype=torch.float64)
    gradients = []
    for chunked in (False, True):
        detach = attach_chunked_loss(model, chunked=chunked, chunk_tokens=4)
        loss = _TwoHeads(model)(BATCH["input_ids"], BATCH["labels"])
        gradients.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        detach()
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def _bart() -> nn.Module:
    config = BartConfig(vocab_size=11, d_model=16, encoder_layers=1, decoder_layers=1)
    return BartForConditionalGeneration(config)


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


@pytest.mark.parametrize("build", [_bart, _t5])
def test_models_that_compute_their_loss_themselves_are_refused(build):
    with pytest.raises(ValueError, match="ForConditionalGeneration computes its loss inside its forward"):
        attach_chunked_loss(build())


LLAMA = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)


def test_a_forward_that_calls_the_inherited_one_is_followed():
    class Llama(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = Llama(LLAMA)
    attach_chunked_loss(model)
    assert type(model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits) is LazyLogits


def test_another_loss_type_is_refused():
    with pytest.raises(ValueError, match="'ForSequenceClassificationLoss' .loss_type 'ForSequenceClassification'."):
        attach_chunked_loss(LlamaForSequenceClassification(LLAMA))


def test_a_loss_set_by_hand_is_refused_and_kept():
    model = build_model("llama")

    def my_loss(**_: Any) -> Tensor:
        return torch.zeros(())

    model.loss_function = my_loss
    with pytest.raises(ValueError, match="has the loss 'my_loss'"):
        attach_chunked_loss(model)
    assert model.loss_function is my_loss and "forward" not in vars(model.lm_head)


def test_a_model_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="LlamaModel computes its loss inside its forward|has no output head"):
        attach_chunked_loss(LlamaModel(LLAMA))


def test_a_second_attachment_is_refused():
    model = build_model("llama")
    attach_chunked_loss(model)
    with pytest.raises(ValueError, match="has this loss attached already: detach it first"):
        attach_chunked_loss(model)


def test_a_head_that_needs_more_than_hidden_states_is_refused():
    class Head(nn.Linear):
        def forward(self, hidden: Tensor, temperature: float) -> Tensor:  # type: ignore[override]
            return super().forward(hidden) / temperature

    model = build_model("llama")
    model.lm_head = Head(64, VOCABULARY)
    with pytest.raises(ValueError, match="must take the hidden states alone: missing a required argument"):
        attach_chunked_loss(model)
    assert model.loss_function is ForCausalLMLoss


def test_gradient_checkpointing():
    model = build_model("llama")
    expected = torch.autograd.grad(model(**BATCH).loss, list(model.parameters()))
    attach_chunked_loss(model, chunk_tokens=4)
    model.gradient_checkpointing_enable()
    found = torch.autograd.grad(model(**BATCH).loss, list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
