"""The compiled steps of the loss equal the formula, in a model's step too, and are compiled once for all sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hf_veomni.loss import attach_chunked_loss, chunked
from tests.models import build_model, padded_batch


def test_functions_equal_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(7, 40, generator=generator)).requires_grad_()
    targets = torch.randint(0, 40, (7,), generator=generator)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(2.5 * loss, logits)
    with torch.no_grad():
        lse, of_target = chunked.log_sum_exp(logits, targets)
        scale = torch.tensor(2.5)
        blocks = [chunked.loss_gradient(logits[:, i : i + 15], lse, targets - i, scale) for i in (0, 15, 30)]
    torch.testing.assert_close((lse - of_target).sum(), loss)
    torch.testing.assert_close(torch.cat(blocks, 1), wanted)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_step_of_a_model(name: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the functions apply, with chunks of tokens and blocks of the vocabulary."""
    calls = []
    monkeypatch.setattr(chunked, "can_compile", lambda logits: True)
    monkeypatch.setattr(chunked, "compiled", lambda function: calls.append(function.__name__) or function)
    model = build_model(name).float().train()
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    batch = padded_batch([17, 14]) | {"use_cache": False}

    def step(**options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        detach = attach_chunked_loss(model, **options)
        loss = model(**batch, num_items_in_batch=40).loss
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        detach()
        return loss.detach(), list(gradients)

    wanted = step(chunked=False)
    assert calls == []
    found = step(chunk_tokens=5)
    assert calls.count("log_sum_exp") > 3 and calls.count("loss_gradient") > 3
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_compiled_once_for_all_sizes() -> None:
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph

    logits, scale = torch.randn(12, 64), torch.tensor(0.5)
    for function in (chunked.log_sum_exp, chunked.loss_gradient):
        compilations.clear()
        compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
        for tokens, classes in ((12, 64), (9, 33), (5, 64)):
            block, targets = logits[:tokens, :classes].clone(), torch.arange(tokens)
            arguments = (block, targets) if function is chunked.log_sum_exp else (block, block.amax(1), targets, scale)
            torch.testing.assert_close(compiled(*arguments), function(*arguments))
        assert len(compilations) == 1
    assert not chunked.can_compile(logits)  # on the CPU


def test_too_many_kinds_to_compile_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind torch's limit the functions run as they are."""
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(chunked.torch, "compile", partial(torch.compile, backend=backend))
    compiled = chunked.compiled.__wrapped__(chunked.log_sum_exp)
    with torch._dynamo.config.patch(recompile_limit=1):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            logits, targets = torch.randn(12, 64).to(dtype), torch.arange(12)
            torch.testing.assert_close(compiled(logits, targets), chunked.log_sum_exp(logits, targets))
    assert len(compilations) == 1


def test_a_compiled_model_leaves_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sizes change with the labels: traced, it would be compiled anew with each row."""
    traced = []

    def applies(logits: torch.Tensor) -> bool:
        traced.append(torch.compiler.is_compiling())
        return False

    monkeypatch.setattr(chunked, "can_compile", applies)
    model = build_model("llama").float().train()
    batch = padded_batch([17, 14]) | {"use_cache": False}
    detach = attach_chunked_loss(model, chunk_tokens=5)
    loss = torch.compile(model, backend="eager")(**batch).loss
    loss.backward()
    detach()
    assert not any(traced)  # empty with torch 2.11, which computes the logits of a compiled model


def test_modes_that_see_every_operator_see_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_works", lambda device, dtype: True)
    with FakeTensorMode():
        logits = torch.empty(4096, 8192, device="cuda", dtype=torch.bfloat16)
        assert not chunked.can_compile(logits)  # a dry run
    assert chunked.can_compile(logits)
    with FlopCounterMode(display=False):
        assert not chunked.can_compile(logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cuda_equals_step_by_step(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (3 * torch.randn(1000, 20_011, device="cuda", generator=generator)).to(dtype)
    targets = torch.randint(0, 20_011, (1000,), device="cuda", generator=generator)
    scale = torch.tensor(0.25, device="cuda")
    assert chunked.can_compile(logits)
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(0.25 * loss, exact)
    lse, of_target = chunked.compiled(chunked.log_sum_exp)(logits, targets)
    gradient = chunked.compiled(chunked.loss_gradient)(logits, lse, targets, scale)
    assert abs(float((lse - of_target).double().sum() / loss) - 1) < 1e-6
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    assert float((gradient.double() - wanted).norm() / wanted.norm()) < limit
