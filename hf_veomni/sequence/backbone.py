"""Where a backbone keeps its layers, and what their code does with the length of what they are given."""

from __future__ import annotations

import inspect
import re
from collections.abc import Container, Iterable
from functools import lru_cache
from typing import Any

from torch import nn

from hf_veomni.sequence.families.core import has_patch

# Names of methods that a hook runs at the length of the full row (`bias`).
BIAS_METHODS: tuple[str, ...] = ("compute_bias",)


def asks_interface(module: nn.Module) -> bool:
    """Whether the module is an attention that asks transformers' AttentionInterface, itself or in a method of its."""
    return {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= own_names(type(module))


def attends(module: nn.Module) -> bool:
    """Whether the module is an attention that can be exchanged: by the interface or by a patch."""
    return asks_interface(module) or has_patch(module)


@lru_cache(maxsize=1024)
def own_names(owner: type) -> frozenset[str]:
    """Names that the forward of a class uses, and the methods of the class that it calls; BIAS_METHODS left out."""
    names: set[str] = set()
    todo, done = ["forward"], set(BIAS_METHODS)
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        method: Any = inspect.getattr_static(owner, name, None)
        method = getattr(method, "__func__", method)
        if not inspect.isfunction(method) or method.__module__.startswith("torch."):
            continue
        for code in _codes(inspect.unwrap(method).__code__):
            names |= set(code.co_names)
        todo += [found for found in names if found not in done]
    return frozenset(names)


def _codes(code: Any) -> Iterable[Any]:
    yield code
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _codes(constant)


def find_layers(
    backbone: nn.Module, gathered: Container[nn.Module] = frozenset()
) -> tuple[nn.Module, nn.ModuleList] | None:
    """(the module that holds them, the layers) of a backbone: `layers`, else the one list whose items all attend.

    What the plan has on full documents (`gathered`) counts as attention.

    Lists inside of other such lists are parts of a layer (ALBERT's groups). None if there is no such list, or several.
    """
    own = getattr(backbone, "layers", None)
    if isinstance(own, nn.ModuleList):
        return backbone, own
    found: list[tuple[nn.Module, nn.ModuleList]] = []
    inside: set[nn.Module] = set()
    for owner in backbone.modules():
        for child in owner.children():
            if not isinstance(child, nn.ModuleList) or not len(child) or child in inside:
                continue
            if all(any(m in gathered or attends(m) for m in item.modules()) for item in child):
                found.append((owner, child))
                inside.update(m for m in child.modules() if m is not child)
    return found[0] if len(found) == 1 else None


def makes_masks(modules: Iterable[nn.Module]) -> bool:
    """Whether some of the modules make their masks with transformers' functions, which know packed documents."""
    return any(name.startswith("create_") and "mask" in name for module in modules for name in own_names(type(module)))


def reads_padding(model: nn.Module) -> bool:
    """Whether a model's own loss reads scores of padding: spans of an answer are softmaxed over the full row.

    What a token of padding sees is then part of the loss. Stock sdpa and eager let it attend to the tokens of its row,
    flash attention and the varlen attention give zeros.
    """
    return "start_positions" in inspect.signature(model.forward).parameters


def masks_on_demand(backbone: nn.Module) -> bool:
    """Whether a backbone makes a causal mask only where it is given one of tokens (AIMv2)."""
    try:
        source = inspect.getsource(inspect.unwrap(type(backbone).forward))
    except (OSError, TypeError):
        return False
    return re.search(r"if attention_mask is not None:\s+attention_mask = create_causal", source) is not None


def looks_ahead_by_kernel(backbone: nn.Module, attentions: Iterable[nn.Module]) -> bool:
    """Whether a backbone makes causal masks for attention that its config has look ahead (PaliGemma's Gemma).

    What such a row sees without an explicit mask depends on the kernel: sdpa drops the mask and looks ahead.
    """
    names = own_names(type(backbone))
    chosen = getattr(getattr(backbone, "config", None), "use_bidirectional_attention", False)
    ahead = bool(chosen) and not any(getattr(module, "is_causal", False) for module in attentions)
    return ahead and "create_causal_mask" in names and not any("bidirectional" in name for name in names)


def views_as_row(backbone: nn.Module) -> bool:
    """Whether a backbone ends with `hidden_states.view(output_shape)` after `ln_f`, a shape noted at its top
    (GPT-2)."""
    return notes_shape(backbone) and isinstance(getattr(backbone, "ln_f", None), nn.Module)


def notes_shape(backbone: nn.Module) -> bool:
    """Whether the backbone's forward remembers the shape of its output before its layers run."""
    return "output_shape" in inspect.unwrap(type(backbone).forward).__code__.co_varnames


def counts_rows(model: nn.Module) -> bool:
    """Whether what stands around a backbone counts the tokens of a row (a head of weights for each place in it)."""
    return "arange" in inspect.unwrap(type(model).forward).__code__.co_names
