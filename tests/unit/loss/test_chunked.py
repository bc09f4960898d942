"""The loss from lazy logits equals the loss from the logits, with all its gradients, and holds one chunk."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother

from hf_veomni.errors import UnsupportedError
from hf_veomni.loss import LazyLogits, attach_chunked_loss
from hf_veomni.loss.head import default_chunk_tokens
from tests.models import VOCABULARY, build_model, padded_batch

CHUNK = 5


class _Shapes(TorchDispatchMode):
    """Output shapes of all operators, and how many matmuls there were."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.matmuls: list[tuple[int, ...]] = []
        self.most_chunks = 0  # that were alive at once
        self._chunks: list[weakref.ref] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.shapes.append(tuple(x.shape))
                if x.numel() == CHUNK * VOCABULARY:
                    self._chunks.append(weakref.ref(x.untyped_storage()))
                    alive = {id(ref()) for ref in self._chunks if ref() is not None}
                    self.most_chunks = max(self.most_chunks, len(alive))
                if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                    self.matmuls.append(tuple(x.shape))
        return out


def _batch(rows: int = 2, tokens: int = 17) -> dict[str, Tensor]:
    return padded_batch([tokens, tokens - 3][:rows]) | {"use_cache": False}


def _step(model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    out = model(**batch, **kwargs)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _assert_same_step(model: nn.Module, batch: dict[str, Any] | None = None, tolerance: float = 1e-11, **kwargs: Any):
    """One step with the full logits, then one with lazy logits: same loss, same gradients."""
    batch = batch or _batch()
    detach = attach_chunked_loss(model, chunked=False)
    full, expected = _step(model, batch, **kwargs)
    detach()
    detach = attach_chunked_loss(model, chunk_tokens=CHUNK)
    chunked, gradients = _step(model, batch, **kwargs)
    detach()
    assert type(chunked.logits) is LazyLogits
    assert chunked.logits.recipe.real is None, "the loss must not need the full logits"
    torch.testing.assert_close(chunked.loss, full.loss, rtol=tolerance, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", ["stablelm", "llama", "llama_tied", "cohere", "granite", "gemma2"])
def test_equals_the_full_logits(name, freeze):
    # Models whose norms compute in fp32 are not fp64 throughout, and one ulp may differ between two runs.
    model = build_model(name, dtype=torch.float64)
    model.get_output_embeddings().weight.requires_grad_(not freeze)
    _assert_same_step(model, num_items_in_batch=23)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_equals_stock_transformers(name):
    model = build_model(name)
    stock, expected = _step(model, _batch())
    attach_chunked_loss(model, chunk_tokens=CHUNK)
    chunked, gradients = _step(model, _batch())
    torch.testing.assert_close(chunked.loss, stock.loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("freeze", [False, True])
def test_head_with_a_bias(freeze):
    model = build_model("llama", dtype=torch.float64)
    model.lm_head = nn.Linear(64, VOCABULARY, dtype=torch.float64)
    model.lm_head.weight.requires_grad_(not freeze)
    _assert_same_step(model)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
        LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, lora_dropout=0.0),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 7]}, init_lora_weights=False),
    ],
    ids=["frozen head", "adapter on the head", "saved head", "trainable tokens"],
)
def test_peft(config):
    _assert_same_step(get_peft_model(build_model("llama", dtype=torch.float64), config).double())


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", ["stablelm", "cohere", "gemma2"])
def test_label_smoothing_equals_the_label_smoother(name, freeze):
    model = build_model(name, dtype=torch.float64)
    model.get_output_embeddings().weight.requires_grad_(not freeze)
    batch = _batch()
    labels = batch.pop("labels")
    expected = LabelSmoother(epsilon=0.2)(model(**batch), labels, shift_labels=True, num_items_in_batch=19)
    expected.backward()
    expected_gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    attach_chunked_loss(model, chunk_tokens=CHUNK, label_smoothing=0.2)
    chunked, gradients = _step(model, batch | {"labels": labels}, num_items_in_batch=19)
    assert chunked.logits.recipe.real is None
    # The smoother adds up its second term in fp32.
    torch.testing.assert_close(chunked.loss, expected.double(), rtol=1e-6, atol=0)
    for key, gradient in gradients.items():
        assert (gradient - expected_gradients[key]).norm() / gradient.norm() < 1e-6, key


@pytest.mark.parametrize("freeze", [False, True])
def test_never_holds_more_than_a_chunk(freeze):
    model = build_model("llama")
    model.lm_head.weight.requires_grad_(not freeze)
    attach_chunked_loss(model, chunk_tokens=CHUNK)
    hidden, labels = torch.randn(1, 200, 64, requires_grad=True), torch.randint(0, VOCABULARY, (1, 200))
    with _Shapes() as seen:
        model.loss_function(model.lm_head(hidden), labels).backward()
    assert (CHUNK, VOCABULARY) in seen.shapes
    largest = max(torch.Size(shape).numel() for shape in seen.shapes if 64 not in shape)  # 64: hidden and weight
    assert largest == CHUNK * VOCABULARY
    assert seen.most_chunks == 1, "a chunk is overwritten in place, and freed before the next"


def test_a_frozen_head_costs_two_matmuls_and_none_in_backward():
    model = build_model("llama")
    model.lm_head.weight.requires_grad_(False)
    attach_chunked_loss(model, chunk_tokens=CHUNK)
    hidden, labels = torch.randn(1, 2 * CHUNK + 1, 64, requires_grad=True), torch.zeros(1, 11, dtype=torch.long)
    with _Shapes() as forward:
        loss = model.loss_function(model.lm_head(hidden), labels)
    with _Shapes() as backward:
        loss.backward()
    assert forward.matmuls == [(CHUNK, VOCABULARY), (CHUNK, 64)] * 2
    assert backward.matmuls == [] and model.lm_head.weight.grad is None


def test_tokens_without_a_target_are_left_out():
    model = build_model("llama")
    attach_chunked_loss(model, chunk_tokens=1000)
    batch = _batch()
    scored = int((batch["labels"][:, 1:] != -100).sum())
    with _Shapes() as seen:
        model(**batch)
    assert [shape for shape in seen.shapes if shape[-1:] == (VOCABULARY,)][-1] == (scored, VOCABULARY)


@pytest.mark.parametrize("freeze", [False, True])
def test_without_any_target_gradients_are_zero_and_reach_everything(freeze):
    model = build_model("llama")
    model.lm_head.weight.requires_grad_(not freeze)
    attach_chunked_loss(model)
    batch = _batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    out, gradients = _step(model, batch, num_items_in_batch=4)
    assert out.loss == 0
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())
    assert torch.isnan(model(**batch).loss)


@pytest.mark.parametrize("freeze", [False, True])
def test_the_loss_can_be_scaled_squared_and_used_twice(freeze):
    model = build_model("stablelm", dtype=torch.float64)
    model.lm_head.weight.requires_grad_(not freeze)

    def gradients(chunked: bool) -> list[Tensor]:
        detach = attach_chunked_loss(model, chunked=chunked, chunk_tokens=CHUNK)
        model.zero_grad()
        loss = model(**_batch()).loss
        (3 * loss**2).backward(retain_graph=True)
        loss.backward()
        detach()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-9, atol=1e-12)


def test_second_derivatives_are_refused():
    model = build_model("llama")
    attach_chunked_loss(model)
    loss = model(**_batch()).loss
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)


def _relative_errors(dtype: torch.dtype, scale: float, chunked: bool, freeze: bool) -> list[float]:
    model = build_model("llama", dtype=torch.float64)
    model.lm_head.weight.requires_grad_(not freeze)
    low = copy.deepcopy(model).to(dtype)
    for p, q in zip(model.parameters(), low.parameters(), strict=True):
        p.data.copy_(q.data)
    hidden = torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(2))
    gradients = []
    for head, h in ((model, hidden.double()), (low, hidden)):
        attach_chunked_loss(head, chunked=chunked, chunk_tokens=CHUNK)
        h = h.clone().requires_grad_()
        loss = head.loss_function(head.lm_head(h), labels, VOCABULARY)
        (loss * scale).backward()
        gradients.append([loss.detach(), h.grad] + [head.lm_head.weight.grad] * (not freeze))
    return [float((x.double() - y).norm() / y.norm()) for y, x in zip(*gradients, strict=True)]


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 4096.0)])
def test_low_precision_is_as_accurate_as_the_full_logits(dtype, scale, freeze):
    chunked = _relative_errors(dtype, scale, chunked=True, freeze=freeze)
    full = _relative_errors(dtype, scale, chunked=False, freeze=freeze)
    for ours, theirs in zip(chunked, full, strict=True):
        assert ours < 1.5 * theirs + 1e-5


@pytest.mark.parametrize("freeze", [False, True])
def test_autocast(freeze):
    model = build_model("llama")
    model.lm_head.weight.requires_grad_(not freeze)

    def step(chunked: bool) -> tuple[Any, dict[str, Tensor]]:
        detach = attach_chunked_loss(model, chunked=chunked, chunk_tokens=CHUNK)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(**_batch())
        out.loss.backward()
        detach()
        return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (full, expected), (chunked, gradients) = step(False), step(True)
    assert chunked.logits.dtype == full.logits.dtype == torch.bfloat16
    assert chunked.loss.dtype == torch.float32
    torch.testing.assert_close(chunked.loss, full.loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() / expected[name].norm() < 0.02, name
    torch.testing.assert_close(chunked.logits * 1, full.logits, rtol=0, atol=0)  # outside of autocast


def test_evaluation_of_the_loss_computes_no_gradients():
    model = build_model("llama")
    model.lm_head.weight.requires_grad_(False)
    attach_chunked_loss(model, chunk_tokens=CHUNK)
    hidden, labels = torch.randn(1, 20, 64), torch.randint(0, VOCABULARY, (1, 20))
    with _Shapes() as seen:
        model.loss_function(model.lm_head(hidden), labels, VOCABULARY)
    assert {shape[-1] for shape in seen.matmuls} == {VOCABULARY}


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_dry_run(mode):
    with mode():
        model = build_model("llama")
        attach_chunked_loss(model, chunk_tokens=CHUNK)
        hidden = torch.empty(1, 30, 64, requires_grad=True)
        labels = torch.zeros(1, 30, dtype=torch.long)
        with _Shapes() as seen:
            model.loss_function(model.lm_head(hidden), labels, VOCABULARY).backward()
    assert hidden.grad is not None and model.lm_head.weight.grad is not None
    assert (30, VOCABULARY) not in seen.shapes


def test_targets_out_of_the_vocabulary_are_refused():
    model = build_model("llama")
    attach_chunked_loss(model)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        model.loss_function(model.lm_head(torch.randn(1, 3, 64)), torch.tensor([[1, VOCABULARY, 2]]), VOCABULARY)


def test_reference_cross_entropy_on_scaled_logits():
    """Against torch alone: scaling, cap and cast between head and loss."""
    model = build_model("llama", dtype=torch.float64)
    attach_chunked_loss(model, chunk_tokens=CHUNK)
    hidden = torch.randn(1, 12, 64, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (1, 12))
    logits = (torch.tanh(model.lm_head(hidden) / 7) * 7 + 0.5).double()
    ours = torch.autograd.grad(model.loss_function(logits, labels), [hidden, model.lm_head.weight])
    scores = torch.tanh(F.linear(hidden, model.lm_head.weight) / 7) * 7 + 0.5
    reference = F.cross_entropy(scores[0, :-1], labels[0, 1:])
    theirs = torch.autograd.grad(reference, [hidden, model.lm_head.weight])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_an_accelerator_scores_more_tokens_at_once(device: str) -> None:
    """Hidden states of 8K tokens in bf16, 4,096 wide."""
    hidden = 8192 * 4096 * 2
    assert default_chunk_tokens(151_936, hidden) == 220
    assert default_chunk_tokens(151_936, hidden, device) == 883
    assert default_chunk_tokens(151_936, hidden // 64, device) == 512
    assert default_chunk_tokens(151_936, 2 * hidden, device) == 1766
    assert default_chunk_tokens(151_936, 8 * hidden, device) == 2048
    assert default_chunk_tokens(32_000, hidden, device) == 2048
