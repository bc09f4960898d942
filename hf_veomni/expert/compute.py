"""The experts' matmuls over rows that are sorted by expert.

Shapes: R rows, H hidden size, I intermediate size, e local experts, r rank of an adapter.

The same flags that transformers' own implementations read (`has_gate`, `has_bias`, `is_transposed`,
`has_post_expert_norm`, `_apply_gate`) say what a family's experts compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_veomni.expert.dispatch import Route

_ALIGNMENT = 16  # bytes that grouped_mm wants the strides of its operands to be a multiple of


@dataclass(frozen=True)
class LowRank:
    """One adapter of one stacked parameter: adds scaling * (x A^T) B^T.

    Attributes:
        a: [e, r, in].
        b: [e, out, r].
    """

    a: Tensor
    b: Tensor
    scaling: float


def has_grouped_kernel(device: torch.device) -> bool:
    """Where `torch.nn.functional.grouped_mm` is one kernel and no loop."""
    return device.type == "cuda"


def _grouped_mm_fits(x: Tensor, weight: Tensor) -> bool:
    if not has_grouped_kernel(x.device) or weight.dtype not in (torch.bfloat16, torch.float16):
        return False  # fp32 and fp64, and any CPU: one matmul an expert is exact, and fast where there are few
    return all(size * weight.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])


def _settle_autocast(weight: Tensor) -> Tensor:
    """Cast as autocast would at a plain matmul: it knows no grouped one."""
    kind = weight.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return weight.to(torch.get_autocast_dtype(kind)) if enabled and weight.dtype != torch.float64 else weight


def grouped_matmul(x: Tensor, weight: Tensor, route: Route) -> Tensor:
    """Each block of rows times its own matrix.

    Args:
        x: [R, K], sorted by group.
        weight: [e, K, N].
        route: rows of each group, of which only the loop over groups asks the host.

    Returns:
        [R, N], in the dtype of the weight, or of autocast. A group without rows gets a gradient of zeros.
    """
    weight = _settle_autocast(weight)
    if _grouped_mm_fits(x, weight):
        return F.grouped_mm(x.to(weight.dtype), weight, offs=route.counts.cumsum(0).to(torch.int32))
    parts = [rows.to(weight.dtype) @ matrix for rows, matrix in zip(x.split(route.sizes), weight, strict=True)]
    return torch.cat(parts)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, adapters: Sequence[LowRank], route: Route
) -> Tensor:
    """x [R, in] -> [R, out]; `transposed` weights are stored [e, in, out], others [e, out, in]."""
    out = grouped_matmul(x, weight if transposed else weight.mT, route)
    for adapter in adapters:
        low = grouped_matmul(x, adapter.a.mT, route)
        out = out + (grouped_matmul(low, adapter.b.mT, route) * adapter.scaling).to(out.dtype)
    if bias is None:
        return out
    return out + bias.repeat_interleave(route.counts, dim=0, output_size=len(x))


def compute_experts(
    experts: Any, x: Tensor, route: Route, adapters: Mapping[str, Sequence[LowRank]] | None = None
) -> Tensor:
    """The output of every row's expert, without router weights.

    Args:
        experts: a stock experts module whose stacked parameters are this rank's, [e, ...].
        x: [R, H], sorted by local expert as `route` says.
        adapters: adapters by the name of the parameter that they add to.

    Returns:
        [R, H].
    """
    adapters = adapters or {}

    def linear(rows: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        return _linear(rows, getattr(experts, name), bias, experts.is_transposed, adapters.get(name, ()), route)

    hidden = linear(x, "gate_up_proj" if experts.has_gate else "up_proj")
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    out = linear(hidden, "down_proj")
    return experts.post_expert_norm(out) if experts.has_post_expert_norm else out


def compute_as_selected(forward: Callable[..., Tensor], x: Tensor, route: Route) -> Tensor:
    """The same through the module's own forward, for the implementation that the user has selected in the config."""
    ids = torch.arange(len(route.counts), device=x.device)
    ids = ids.repeat_interleave(route.counts, output_size=len(x))[:, None]
    return forward(x, ids, x.new_ones(ids.shape))


def compute_rows(
    experts: Any,
    forward: Callable[..., Tensor] | None,
    adapters: Mapping[str, Sequence[LowRank]],
    x: Tensor,
    route: Route,
) -> Tensor:
    """`compute_experts`, or `forward` of the module where it is given, on any number of rows, none included."""
    rows, local = keep_connected(x, route)
    if forward is None:
        return compute_experts(experts, rows, local, adapters)[: len(x)]
    return compute_as_selected(forward, rows, local)[: len(x)]


def keep_connected(x: Tensor, route: Route) -> tuple[Tensor, Route]:
    """One row of zeros for the first expert where no row came: parameters need a gradient of zeros, not none."""
    if len(x):
        return x, route
    counts = torch.zeros_like(route.counts)
    counts[0] = 1
    row = x.sum(0, keepdim=True)  # zeros, in the graph of the exchange
    return row, Route(route.order, counts, known_sizes=[1, *[0] * (len(counts) - 1)])
