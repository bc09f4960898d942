"""Liger's own functions on a model, with torch in place of its kernels: for machines without a GPU.

Each computes in fp32 by the formula that Liger documents, and writes where the kernel writes: the norm its gradient
over that of its output, the MLP its gradients over what it saved, the rotary embedding over queries and keys.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_veomni.trainer import liger

PACKAGE = "liger_kernel.transformers.monkey_patch"


def _gradients(function: Any, inputs: tuple[Any, ...], gradient: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in inputs]
        return torch.autograd.grad(function(*leaves), leaves, gradient)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float, offset: float, casting_mode: str, in_place: bool, *_: Any):
        assert casting_mode in ("llama", "gemma")  # in fp32 the same

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight)

        ctx.save_for_backward(x, weight)
        ctx.norm, ctx.in_place = norm, in_place
        return norm(x, weight)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        (gradient,) = given
        of_x, of_weight = _gradients(ctx.norm, ctx.saved_tensors, gradient)
        return gradient.copy_(of_x) if ctx.in_place else of_x, of_weight, None, None, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, gate: Any, up: Any) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.function = function
        return function(gate, up)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        gate, up = ctx.saved_tensors
        of_gate, of_up = _gradients(ctx.function, (gate, up), *given)
        return None, gate.copy_(of_gate), up.copy_(of_up)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, width: int) -> Tensor:
    """Over `x` itself where it lies as the projection has written it, [B, S, heads, D]."""
    lying = x.transpose(1, 2).contiguous()
    c, s = (table[:, :, None, : width // 2] for table in (cos, sin))
    left, right, rest = lying.split([width // 2, width // 2, x.shape[-1] - width], dim=-1)
    return lying.copy_(torch.cat([left * c - right * s, right * c + left * s, rest], dim=-1)).transpose(1, 2)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, cos: Any, sin: Any, width: int) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.width = width
        return _turn(q, cos, sin, width), _turn(k, cos, sin, width)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return *(_turn(gradient, cos, -sin, ctx.width) for gradient in given), None, None, None


def put_formulas(patch: pytest.MonkeyPatch) -> None:
    """In place of Liger's kernels, until `patch` ends; rotary embeddings on the CPU too."""
    from liger_kernel.transformers import geglu, rms_norm, rope, swiglu  # type: ignore[import-not-found]

    def silu(gate: Tensor, up: Tensor, *scales: float) -> Any:
        assert scales == (1.0, 1.0)
        return _Gated.apply(lambda gate, up: F.silu(gate) * up, gate, up)

    gelu = partial(_Gated.apply, lambda gate, up: F.gelu(gate, approximate="tanh") * up)

    def rotate(name: str, q: Any, k: Any, cos: Any, sin: Any, *_: object, rotary_dim: int | None = None) -> Any:
        return _Rotary.apply(q, k, cos, sin, rotary_dim or cos.shape[-1])

    patch.setattr(rms_norm, "LigerRMSNormFunction", _Norm)
    patch.setattr(swiglu, "LigerSiLUMulFunction", SimpleNamespace(apply=silu))
    patch.setattr(geglu, "LigerGELUMulFunction", SimpleNamespace(apply=gelu))
    patch.setattr(rope, "dispatch", rotate)
    patch.setattr(liger, "_on_gpu", lambda stock, fast: fast)
