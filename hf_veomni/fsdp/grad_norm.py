"""One gradient norm over parameters on different meshes: dense ones on `fsdp`, experts on `efsdp` x `ep`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch's `clip_grad_norm_`, which takes parameters of one mesh only, for any mixture of meshes.

    Args:
        parameters: sharded or plain; those without a gradient are skipped.

    Returns:
        The norm of all gradients together, before clipping: a plain scalar, the same on all ranks.

    Collectives: for each parameter of a mesh one all-reduce of a number over its axes.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    norms = []
    for group in groups.values():
        norm = get_total_norm([p.grad for p in group if p.grad is not None], norm_type, False, foreach)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"The gradient norm ({total.item()}) is not finite, so gradients cannot be clipped: look for the step's "
            "loss, or pass error_if_nonfinite=False."
        )
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, total, foreach)
    return total
