"""The experts' matmuls over rows that are sorted by expert.

Shapes: R rows, C hidden size, I intermediate size, e local experts, r rank of an adapter.

The same flags that transformers' own implementations read (`has_gate`, `has_bias`, `is_transposed`,
`has_post_expert_norm`, `_apply_gate`) say what a family's experts compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT = 16  # bytes that grouped_mm wants the strides of its operands to be a multiple of


@dataclass(frozen=True, eq=False)
class Groups:
    """How many rows belong to each expert; they lie behind each other, sorted by expert.

    Attributes:
        counts: [e].
        known_sizes: the same on the host where it had to be read; None where nobody has asked yet.
    """

    counts: Tensor
    known_sizes: list[int] | None = None

    @cached_property
    def sizes(self) -> list[int]:
        """`counts` on the host: of sizes that are not known the first look waits for the device."""
        return self.counts.tolist() if self.known_sizes is None else self.known_sizes


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


def grouped_matmul(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Each block of rows times its own matrix.

    Args:
        x: [R, in], sorted by group.
        weight: [e, in, out].
        groups: of the rows; only the loop over them asks the host.

    Returns:
        [R, out], in the dtype of the weight, or of autocast. A group without rows gets a gradient of zeros.
    """
    weight = _settle_autocast(weight)
    if _grouped_mm_fits(x, weight):
        return F.grouped_mm(x.to(weight.dtype), weight, offs=groups.counts.cumsum(0).to(torch.int32))
    parts = [rows.to(weight.dtype) @ matrix for rows, matrix in zip(x.split(groups.sizes), weight, strict=True)]
    return torch.cat(parts)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, adapters: Sequence[LowRank], groups: Groups
) -> Tensor:
    """x [R, in] -> [R, out]; `transposed` weights are stored [e, in, out], others [e, out, in]."""
    out = grouped_matmul(x, weight if transposed else weight.mT, groups)
    for adapter in adapters:
        low = grouped_matmul(x, adapter.a.mT, groups)
        out = out + (grouped_matmul(low, adapter.b.mT, groups) * adapter.scaling).to(out.dtype)
    if bias is None:
        return out
    return out + bias.repeat_interleave(groups.counts, dim=0, output_size=len(x))


def compute_experts(
    experts: Any, x: Tensor, groups: Groups, adapters: Mapping[str, Sequence[LowRank]] | None = None
) -> Tensor:
    """The output of every row's expert, without router weights.

    Args:
        experts: a stock experts module whose stacked parameters are this rank's, [e, ...].
        x: [R, C], sorted by local expert as `groups` says.
        adapters: adapters by the name of the parameter that they add to.

    Returns:
        [R, C].
    """
    adapters = adapters or {}

    def linear(rows: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        return _linear(rows, getattr(experts, name), bias, experts.is_transposed, adapters.get(name, ()), groups)

    hidden = linear(x, "gate_up_proj" if experts.has_gate else "up_proj")
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    out = linear(hidden, "down_proj")
    return experts.post_expert_norm(out) if experts.has_post_expert_norm else out


def compute_as_selected(forward: Callable[..., Tensor], x: Tensor, groups: Groups) -> Tensor:
    """The same through the module's own forward, for the implementation that the user has selected in the config."""
    ids = torch.arange(len(groups.counts), device=x.device)
    ids = ids.repeat_interleave(groups.counts, output_size=len(x))[:, None]
    return forward(x, ids, x.new_ones(ids.shape))


def compute_rows(
    experts: object,
    forward: Callable[..., Tensor] | None,
    adapters: Mapping[str, Sequence[LowRank]],
    x: Tensor,
    groups: Groups,
) -> Tensor:
    """`compute_experts`, or `forward` of the module where it is given, on any number of rows, none included."""
    rows, local = keep_connected(x, groups)
    if forward is None:
        return compute_experts(experts, rows, local, adapters)[: len(x)]
    return compute_as_selected(forward, rows, local)[: len(x)]


def keep_connected(x: Tensor, groups: Groups) -> tuple[Tensor, Groups]:
    """One row of zeros for the first expert where no row came: parameters need a gradient of zeros, not none."""
    if len(x):
        return x, groups
    counts = torch.zeros_like(groups.counts)
    counts[0] = 1
    row = x.sum(0, keepdim=True)  # zeros, in the graph of the exchange
    return row, Groups(counts, [1, *[0] * (len(counts) - 1)])
