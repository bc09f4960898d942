"""What the loss does between its matmuls, in one pass over the logits: compiled for an accelerator.

Step by step, 78 bytes per logit go through memory in forward and backward, most of them fp32 copies of bf16 logits;
that takes as long as a matmul and a half. Compiled, the logits are read as the matmul wrote them and their gradient is
written as the next one reads it: 16 bytes.

Shapes: N tokens, v classes of a block. No gradients: these are called from a forward and a backward that are written
out (`chunked`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# Logits of a block from which on a compilation of some seconds is worth it.
_LEAST_ELEMENTS = 1 << 24


def log_sum_exp(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of all classes, and the logit of the target; [N, v] and [N] to fp32 [N] and [N]."""
    top = logits.amax(1).float()
    norm = (logits.float() - top[:, None]).exp().sum(1)
    return norm.log() + top, logits.gather(1, targets[:, None]).squeeze(1).float()


def loss_gradient(logits: Tensor, lse: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """(softmax - one-hot) * scale in the dtype of the logits; [N, v].

    Args:
        lse: log-sum-exp of all classes, fp32 [N].
        targets: columns of this block, others if the target is in another block; [N].
        scale: scalar.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    one_hot = (columns == targets[:, None]).float()
    return (((logits.float() - lse[:, None]).exp() - one_hot) * scale).to(logits.dtype)


@lru_cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for all sizes, and anew for each dtype and state of the process (inference mode, TF32, a default
    device). Beyond its limit of 8 torch says so and runs the function as it is, where `fullgraph` would raise."""
    return torch.compile(function, dynamic=True)


@torch.compiler.disable
def applies(logits: Tensor) -> bool:
    """Whether the compiled functions take these, which the first call tries. Not beneath a mode that wants to see
    every operator: a dry run, a counter of FLOPs."""
    return (
        logits.is_cuda
        and logits.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and logits.numel() >= _LEAST_ELEMENTS
        and not is_in_torch_dispatch_mode()
        and _works(logits.device, logits.dtype)
    )


@lru_cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Compile, and compare with the same functions step by step."""
    generator = torch.Generator(device).manual_seed(0)  # the global one is left alone
    logits = torch.randn(64, 4096, device=device, generator=generator).to(dtype)
    targets, scale = torch.arange(64, device=device) * 64, torch.full((), 0.5, device=device)
    try:
        lse, chosen = compiled(log_sum_exp)(logits, targets)
        found = [lse, chosen, compiled(loss_gradient)(logits, lse, targets, scale)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler of this device says
        warnings.warn(
            f"The loss is computed step by step, since it could not be compiled: {error!r:.500}", stacklevel=3
        )
        return False
    lse, chosen = log_sum_exp(logits, targets)
    wanted = [lse, chosen, loss_gradient(logits, lse, targets, scale)]
    errors = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(found, wanted, strict=True)]
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    if max(errors) > limit:
        warnings.warn(f"The compiled loss is off by {max(errors):.0e}: it is computed step by step.", stacklevel=3)
    return max(errors) <= limit
