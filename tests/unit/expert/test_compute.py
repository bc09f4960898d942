"""Experts' matmuls: which kernel takes them, and what it asks the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_veomni.expert import compute
from hf_veomni.expert.dispatch import make_route

ROWS, EXPERTS, WIDTH, OUT = 24, 4, 16, 32


def _inputs() -> tuple[Tensor, Tensor, compute.Groups]:
    torch.manual_seed(0)
    index = torch.randint(EXPERTS, (ROWS, 1))
    return torch.randn(ROWS, WIDTH), torch.randn(EXPERTS, WIDTH, OUT), make_route(index, EXPERTS, None).groups


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The grouped kernel as on a GPU; of each call, the dtype of its operands."""
    monkeypatch.setattr(compute, "has_grouped_kernel", lambda device: True)
    calls: list[torch.dtype] = []
    stock = F.grouped_mm

    def grouped_mm(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        assert x.dtype == weight.dtype
        calls.append(x.dtype)
        return stock(x, weight, **options)

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    return calls


def test_fp32_weights_under_autocast_take_the_kernel(kernel_calls: list[torch.dtype]) -> None:
    """As when LoRA is trained on experts with bf16 autocast; a plain matmul under autocast says what is right."""
    x, weight, groups = _inputs()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([rows @ matrix for rows, matrix in zip(x.split(groups.sizes), weight, strict=True)])
        out = compute.grouped_matmul(x, weight, groups)
    assert kernel_calls == [torch.bfloat16] and out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, weight), grad)
    for mine, theirs in zip(found, torch.autograd.grad(expected, (x, weight), grad), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_the_kernel_asks_the_host_nothing(kernel_calls: list[torch.dtype]) -> None:
    x, weight, groups = _inputs()
    compute.grouped_matmul(x.bfloat16(), weight.bfloat16(), groups)
    assert kernel_calls and "sizes" not in vars(groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_left_to_plain_matmuls(kernel_calls: list[torch.dtype], dtype: torch.dtype) -> None:
    x, weight, groups = _inputs()
    out = compute.grouped_matmul(x.to(dtype), weight.to(dtype), groups)
    assert not kernel_calls and out.dtype == dtype
