"""One gradient norm over parameters on different meshes: dense ones on `fsdp`, experts on `efsdp` x `ep`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hf_veomni.comm.gather import all_gather

# Marks of parameters of a pipeline stage: the group of ranks that have the other ones, and that another stage has
# this one too.
_STAGES, _COUNTED_ELSEWHERE = "_omni_stages", "_omni_counted_elsewhere"


def mark_stage(parameters: Iterable[Tensor], stages: dist.ProcessGroup, elsewhere: Iterable[Tensor]) -> None:
    """Let the norm of these parameters' gradients be that of all stages.

    Args:
        stages: the ranks with this one's place in each stage.
        elsewhere: those among them of which another stage has the same gradient, and counts it.
    """
    for parameter in parameters:
        setattr(parameter, _STAGES, stages)
    for parameter in elsewhere:
        setattr(parameter, _COUNTED_ELSEWHERE, True)


def _of_all_stages(
    norms: list[Tensor], norm_type: float, device: torch.device, stages: dist.ProcessGroup
) -> list[Tensor]:
    """Norms of this stage to those of all stages. Collective: an all-gather of a number over the stages."""
    mine = torch.zeros(1, dtype=torch.float64, device=device)
    if norms:
        mine[0] = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]).double(), norm_type)
    dtype = norms[0].dtype if norms else torch.float32
    return list(all_gather(mine, stages).to(dtype))


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

    Collectives: for each parameter of a mesh one all-reduce of a number over its axes; one over the stages of a
    pipeline, each of which has gradients of its own.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    stages = next((found for p in parameters if (found := getattr(p, _STAGES, None)) is not None), None)
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    norms = []
    for group in groups.values():
        counted = [p.grad for p in group if p.grad is not None and not hasattr(p, _COUNTED_ELSEWHERE)]
        norm = get_total_norm(counted, norm_type, False, foreach)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms and stages is None:
        return torch.tensor(0.0)
    if stages is not None:
        norms = _of_all_stages(norms, norm_type, parameters[0].device, stages)
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"The gradient norm ({total.item()}) is not finite, so gradients cannot be clipped: look for the step's "
            "loss, or pass error_if_nonfinite=False."
        )
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, total, foreach)
    return total
