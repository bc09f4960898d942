"""What `prepare_omni` could leave on a model and in the process, as plain values that can be compared."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


OURS = ("omni_varlen", "omni|")  # stay registered: a name that a config may select, and names that only we select


def traces(model: nn.Module) -> dict[Any, Any]:
    """Hooks, attributes, classes, attention choices and loss function of a model.

    Values that PyTorch keeps in the module (parameters, submodules) are named, not compared.
    """
    found: dict[Any, Any] = {}
    for path, module in model.named_modules():
        found[path, "class"] = type(module)
        for hooks in _HOOKS:
            found[path, hooks] = list(getattr(module, hooks).values())
        found[path, "attributes"] = {key: _identity(value) for key, value in vars(module).items() if key != "training"}
        if (config := getattr(module, "config", None)) is not None and hasattr(config, "_attn_implementation"):
            found[path, "attention"] = config._attn_implementation
        if isinstance(module, PreTrainedModel):
            found[path, "loss"] = module.loss_function
    return found


def changes(before: dict[Any, Any], after: dict[Any, Any]) -> list[str]:
    """What differs between two `traces`, readable."""
    found = []
    for key in before.keys() | after.keys():
        one, other = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += [f"{key} {n}: {one.get(n)} -> {other.get(n)}" for n in one | other if one.get(n) != other.get(n)]
        elif one != other:
            found.append(f"{key}: {one} -> {other}")
    return found


def wrapped_functions() -> list[str]:
    """Registered attention functions whose code is hf_veomni's, but for its own."""
    functions = AttentionInterface._global_mapping.items()
    return [name for name, f in functions if not name.startswith(OURS) and "hf_veomni" in f.__code__.co_filename]


def left_by_us(model: nn.Module) -> list[str]:
    """Hooks and attributes of a model that are hf_veomni's, but for those of sharded parameters."""
    found = []
    for path, module in model.named_modules():
        values = [*vars(module).items(), *((hooks, h) for hooks in _HOOKS for h in getattr(module, hooks).values())]
        for key, value in values:
            owner = getattr(getattr(value, "__func__", value), "__module__", None) or type(value).__module__
            if owner.startswith("hf_veomni") and not owner.startswith("hf_veomni.fsdp"):
                found.append(f"{path}.{key}: {value}")
    return found


def _identity(value: Any) -> Any:
    if callable(value):
        return id(getattr(value, "__func__", value))
    return sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__  # PEFT reorders parameters
