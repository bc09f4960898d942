"""What runs before the backbone of a model with vision or audio: encoders and projectors, which the first stage runs.

    model                    head                     last stage
      .model                 visual, projector        first stage; other stages leave `pixel_values` out of their calls
        .language_model      embeddings, layers       each stage its own

Features reach the layers within the hidden states, which are sent on. A stage whose call lacks what the encoders
read must make the same masks and positions as the first one. So the source is read: whatever depends on the encoders'
inputs may go into `inputs_embeds` and into features that the first layers add (Qwen3-VL's deepstack), nowhere else.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_veomni import hf
from hf_veomni.pipeline.flow import Flow

INPUTS = ("pixel_values", "pixel_values_videos", "input_features", "input_values", "mm_encoder_outputs")
# Arguments of a backbone that only the first stage needs: hidden states, and what it adds to them in its layers.
DEEP = ("visual_pos_masks", "deepstack_visual_embeds")
_FIRST = ("inputs_embeds", *DEEP)


@dataclass(frozen=True)
class Around:
    """What stands around a backbone.

    Attributes:
        encoders: (parent, name) of modules with parameters that run before the backbone.
        heads: (parent, name) of those that run after it.
        problem: why stages after the first one cannot do without the encoders, in words.
    """

    encoders: tuple[tuple[nn.Module, str], ...]
    heads: tuple[tuple[nn.Module, str], ...]
    problem: str | None


def find_around(model: Any, backbone: nn.Module) -> Around:
    """Look at the modules that hold the backbone, the model among them."""
    head = set(model.get_output_embeddings().modules())
    encoders: list[tuple[nn.Module, str]] = []
    heads: list[tuple[nn.Module, str]] = []
    problem: str | None = None
    for owner, inner in _owners(model, backbone):
        own = [name for name, child in owner.named_children() if name != inner and _has_parameters(child)]
        after = [name for name in own if head & set(owner.get_submodule(name).modules())]
        before = [name for name in own if name not in after]
        loose = next((name for name, _ in owner.named_parameters(recurse=False)), None)
        if loose is not None:
            problem = problem or f"`{loose}` of {type(owner).__name__} belongs to none of its modules"
        elif before:
            problem = problem or _why_not(owner, inner, before)
        heads += [(owner, name) for name in after]
        encoders += [(owner, name) for name in before]
    return Around(tuple(encoders), tuple(heads), problem)


def _owners(model: nn.Module, backbone: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """From the model down to the parent of its backbone: each with the name of the next one."""
    path = next(name for name, module in model.named_modules() if module is backbone).split(".")
    owner = model
    for name in path:
        yield owner, name
        owner = owner.get_submodule(name)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _why_not(owner: nn.Module, inner: str, before: list[str]) -> str | None:
    kind, tree = type(owner).__name__, hf.forward_tree(type(owner))
    calls = [] if tree is None else [node for node in ast.walk(tree) if _is_own(getattr(node, "func", None), inner)]
    if tree is None or len(calls) != 1:
        return f"`{before[0]}` stands beside its backbone, which the forward of {kind} does not call once"
    flow = _EncoderFlow()
    flow.follow(tree)
    outside = next((name for name in before if name in flow.used_always), None)
    if outside is not None:
        return f"{kind} runs `{outside}` also where a row has nothing for it"
    call: Any = calls[0]
    for given in [*((None, x) for x in call.args), *((k.arg, k.value) for k in call.keywords)]:
        if given[0] not in _FIRST and flow.depends(given[1]):
            name = given[0] or ast.unparse(given[1])
            return f"`{name}`, which {kind} hands to every layer, depends on what its encoders read"
    return None


def _is_own(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == name and ast.unparse(node.value) == "self"


class _EncoderFlow(Flow):
    """Which variables of a forward depend on the inputs of encoders, be it by a branch; hidden states do not count."""

    def __init__(self) -> None:
        super().__init__(INPUTS)
        self.used_always: set[str] = set()  # modules that run whatever a row holds

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if not self._inside and ast.unparse(node.value) == "self":
            self.used_always.add(node.attr)
        self.generic_visit(node)
