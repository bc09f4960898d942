"""LoRA on stacked experts: PEFT's own wrappers and files, low-rank matmuls in place of a dense delta of the stack.

Shapes: E experts, r rank of the adapter, in and out features of the adapted parameter.

PEFT adapts a stacked parameter with two matrices in which the experts are interleaved:

    lora_A  [r * E, in]     expert-major: rows e * r ... (e + 1) * r belong to expert e
    lora_B  [out, r * E]    expert fastest: columns e, E + e, 2 E + e ... belong to expert e

Neither is what a rank of the EP group can own a part of along the expert, so on several ranks they become [E, r, in]
and [E, out, r] (`stack_adapters`), under their own names; files keep PEFT's layout (`find_layouts`).

Source: PEFT's `ParamWrapper.get_delta_weight` (peft 0.21, tuners/lora/layer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert.compute import LowRank
from hf_veomni.expert.forward import ExpertsForward, set_adapters
from hf_veomni.expert.layout import ExpertsModule, iterate_wrappers

_LAYOUT = "_omni_expert_layout"
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterLayout:
    """How one stacked adapter matrix looks in PEFT's files.

    Attributes:
        factor: "A" or "B".
        num_experts: E.
    """

    factor: str
    num_experts: int

    def to_stack(self, plain: Tensor) -> Tensor:
        """PEFT's [r * E, in] or [out, r * E] to [E, r, in] or [E, out, r]; a view where possible."""
        if self.factor == "A":
            return plain.reshape(self.num_experts, -1, plain.shape[-1])
        return plain.reshape(plain.shape[0], -1, self.num_experts).permute(2, 0, 1)

    def to_plain(self, stack: Tensor) -> Tensor:
        """The inverse of `to_stack`."""
        if self.factor == "A":
            return stack.reshape(-1, stack.shape[-1])
        return stack.permute(1, 2, 0).reshape(stack.shape[1], -1)


def has_adapters(module: ExpertsModule) -> bool:
    """Whether LoRA is on these experts."""
    return module.outer is not module.experts


def check_adapters(module: ExpertsModule) -> None:
    """Raises UnsupportedError where the adapters of this module cannot be computed in low rank."""
    selected = hf.experts_implementation(module.experts)
    if selected not in ("grouped_mm", "eager"):
        raise UnsupportedError(
            f"`experts_implementation` ({selected!r}) knows no adapters on '{module.name}': select 'grouped_mm'."
        )
    for wrapper in iterate_wrappers(module):
        target = f"{module.name}.{wrapper.parameter_name}"
        if wrapper.parameter_name not in _WEIGHTS:
            raise UnsupportedError(
                f"LoRA on '{target}' is not available: target {' and '.join(_WEIGHTS[::2])} instead."
            )
        if wrapper.merged:
            raise UnsupportedError(
                f"The adapter of '{target}' is merged into the base weight: call `unmerge_adapter()` before "
                "`prepare_omni`, or `merge_and_unload()` to train the merged weights."
            )
        for name in wrapper.lora_A:
            if wrapper.lora_variant.get(name) is not None or wrapper.lora_B[name].bias is not None:
                raise UnsupportedError(f"The adapter '{name}' of '{target}' is not plain LoRA: use LoRA or rsLoRA.")


def _factors(wrapper: Any, name: str) -> list[tuple[nn.Linear, AdapterLayout]]:
    layouts = (AdapterLayout("A", wrapper.num_experts), AdapterLayout("B", wrapper.num_experts))
    return list(zip((wrapper.lora_A[name], wrapper.lora_B[name]), layouts, strict=True))


def _local_stack(linear: nn.Linear, layout: AdapterLayout, dtype: torch.dtype) -> Tensor:
    weight = linear.weight.to_local() if isinstance(linear.weight, DTensor) else linear.weight
    # Contiguous: the grouped kernel takes no matrix without a dimension of stride 1, as PEFT's lora_B would be.
    return (weight if _LAYOUT in vars(linear) else layout.to_stack(weight).contiguous()).to(dtype)


def _active_adapters(module: ExpertsModule) -> dict[str, Sequence[LowRank]]:
    """The adapters of this call, this rank's experts only, in the dtype of the base parameter as in PEFT."""
    found: dict[str, Sequence[LowRank]] = {}
    for wrapper in iterate_wrappers(module):
        if wrapper.disable_adapters:
            continue
        if wrapper.merged:
            raise UnsupportedError(
                f"The adapter of '{module.name}' was merged after `prepare_omni`: merge from the saved adapter, in a "
                "process of its own."
            )
        dtype = getattr(module.experts, wrapper.parameter_name).dtype
        adapters = []
        for name in wrapper.active_adapters:
            if name in wrapper.lora_A:
                a, b = (_local_stack(linear, layout, dtype) for linear, layout in _factors(wrapper, name))
                adapters.append(LowRank(a, b, wrapper.scaling[name]))
        found[wrapper.parameter_name] = adapters
    return found


def attach_adapters(module: ExpertsModule) -> Callable[[], None]:
    """Compute the adapters of one experts module in low rank.

    The outermost wrapper calls the experts straight, so that PEFT forms no delta.

    Returns:
        A function that puts PEFT's own forward back (not on several ranks, where the adapters stay stacked).
    """
    check_adapters(module)
    # Partials and objects, no closures: so a deep copy of the model calls its own experts.
    set_adapters(module.experts, partial(_active_adapters, module))
    module.outer.forward = partial(_call_experts, module.experts)  # type: ignore[method-assign]
    sharded = "forward" in vars(module.experts)
    if not sharded:  # every expert is here
        module.experts.forward = ExpertsForward(module.experts)  # type: ignore[method-assign]
    return partial(_detach_adapters, module, sharded)


def _call_experts(experts: nn.Module, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return experts.forward(hidden_states, *args, **kwargs)


def _detach_adapters(module: ExpertsModule, sharded: bool) -> None:
    del module.outer.forward
    set_adapters(module.experts, None)
    if not sharded:
        del module.experts.forward


def stack_adapters(module: ExpertsModule) -> list[str]:
    """Replace the matrices of a module's adapters by stacks [E, ...], which ranks can own parts of.

    Returns:
        Their names within `module.outer`.
    """
    for wrapper in iterate_wrappers(module):
        for adapter in wrapper.lora_A:
            for linear, layout in _factors(wrapper, adapter):
                stack = layout.to_stack(linear.weight.detach()).contiguous()
                linear.weight = nn.Parameter(stack, requires_grad=linear.weight.requires_grad)
                vars(linear)[_LAYOUT] = layout
    return [name for name, child in _stacked(module.outer)]


def _stacked(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.weight", child) for name, child in model.named_modules() if _LAYOUT in vars(child)]


def find_layouts(model: nn.Module) -> dict[str, AdapterLayout]:
    """Name of each stacked adapter matrix -> how PEFT's files keep it."""
    return {name: vars(child)[_LAYOUT] for name, child in _stacked(model)}
