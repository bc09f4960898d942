"""Zero gradients for parameters that a rank's row may not use.

FSDP reduces the gradients of a unit in one collective, of those parameters that have one: ranks on which different
ones have none would wait for each other, or add up what does not belong together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GiveZeros(torch.autograd.Function):
    """Hidden states as they are; in the backward, zeros for parameters that they may not depend on."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like]
        return grads[0], *zeros


def watch_experts(model: nn.Module) -> None:
    """Give experts that no token of a rank reaches a gradient of zeros, where the family leaves them without one.

    Stacked experts have one as soon as any expert is used. Not so a dictionary of experts (NLLB, Switch), nor stacked
    ones beside experts that do nothing (LongCat's zero experts), which may get all tokens of a rank.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleDict) and type(module).forward is not nn.ModuleDict.forward:
            module.register_forward_hook(_touch)
        elif getattr(module, "zero_expert_num", 0) and next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(_touch)


def _touch(experts: nn.Module, args: object, output: object) -> Any:
    parameters = [p for p in experts.parameters() if p.requires_grad]
    if not isinstance(output, Tensor) or not torch.is_grad_enabled() or not parameters:
        return None
    return GiveZeros.apply(output, *parameters)
