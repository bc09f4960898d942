"""The rule of a plan that an error suggests: which modules of a layer would run on full documents."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

# Classes that attend, or mix tokens in its stead, by their names.
_MIXES = re.compile(r"Attention|Attn|Fourier")


def attends_by_name(module: nn.Module) -> bool:
    """Whether the name of a module's class says that it attends."""
    return bool(_MIXES.search(type(module).__name__))


def hint_rule(paths: Iterable[str]) -> str:
    """How to have the modules at `paths` run on full documents, as a refusal says it; nothing without any."""
    patterns = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", path) for path in paths)
    rules = ", ".join(f"'{pattern}': {{'sp': 'gather'}}" for pattern in patterns)
    if not rules:
        return ""
    return f" (under a rule of the plan, modules={{{rules}}}, it runs full documents, at up to sp times the compute)"


def attention_paths(layer: nn.Module, name: str) -> list[str]:
    """Names of the innermost modules of a layer that attend, by the names of their classes."""
    found: list[str] = []
    for path, module in layer.named_modules(prefix=name):
        if module is layer or not attends_by_name(module):
            continue
        found = [outer for outer in found if not path.startswith(f"{outer}.")]
        found.append(path)
    return found


def backbone_paths(backbone: nn.Module, names: Mapping[nn.Module, str]) -> list[str]:
    """Of every item of the one list in a backbone whose items all attend by their names; nothing of several lists."""
    lists: list[nn.ModuleList] = []
    inside: set[nn.Module] = set()
    for module in backbone.modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or module in inside:
            continue
        if all(attention_paths(item, "") for item in module):
            lists.append(module)
            inside.update(module.modules())
    return [path for item in lists[0] for path in attention_paths(item, names[item])] if len(lists) == 1 else []
