"""Is a model a chain of layers that can be cut into stages? Reads the loop over its layers, or says what is there.

    encoders    of images and audio, and their projectors: the first stage
    before      embeddings of the backbone: the first stage
    layers      one statement in a loop, `hidden_states = layer(hidden_states, ...)`: each stage some of them
    after       the backbone's last norm, and the head: the last stage

What crosses from one layer to the next must be the hidden states alone, since that is all that a stage sends on. So
the source of the loop is read, and anything else in it (residuals on the side, keys that later layers share, dropped
layers, the embeddings once more) is refused.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.pipeline.encoders import DEEP, INPUTS, find_around
from hf_veomni.pipeline.flow import ValueFlow
from hf_veomni.sequence.backbone import find_layers

# What records, and changes nothing (it is asked for by name, and refused in calls of a pipeline).
_RECORDS = {"output_hidden_states", "output_attentions"}


@dataclass(frozen=True)
class Chain:
    """Where a model is cut into stages.

    Attributes:
        owner: the backbone; its forward runs the layers.
        layers: all of them.
        before: names of children of `owner` with parameters that run before the layers.
        after: (parent, name) of the modules with parameters that run after them, the head among them.
        gives_tuple: whether a layer returns its hidden states as the first item of a tuple.
        encoders: (parent, name) of modules with parameters that run before the backbone, if a row has what they read.
        inputs: names of the model's arguments that encoders read; only the first stage is called with them.
        deep: how many of the first layers add features of encoders to their output.
    """

    owner: nn.Module
    layers: nn.ModuleList
    before: tuple[str, ...]
    after: tuple[tuple[nn.Module, str], ...]
    gives_tuple: bool
    encoders: tuple[tuple[nn.Module, str], ...] = ()
    inputs: tuple[str, ...] = ()
    deep: int = 0


def find_chain(model: Any) -> Chain:
    """The chain of a causal LM's layers.

    Raises:
        UnsupportedError: the model has parts or a loop that a pipeline cannot cut, by name.
    """
    if hf.is_encoder_decoder(model):
        raise _refuse(model, "it is an encoder-decoder, whose decoder reads what the encoder makes in every layer")
    backbone = hf.find_backbone(model)
    if backbone is model or model.get_output_embeddings() is None:
        raise _refuse(model, "it has no output head, so that no stage would have a loss")
    found = find_layers(backbone)
    if found is None or found[0] is not backbone:
        raise _refuse(model, f"{type(backbone).__name__} does not run its layers in its own forward")
    layers = found[1]
    name = next(name for name, child in backbone.named_children() if child is layers)
    loop, tree = _find_loop(model, backbone, name)
    gives_tuple, deep = _read_loop(model, loop, tree)
    before, after = _sides(model, backbone, name, loop, tree)
    around = find_around(model, backbone)
    if around.problem is not None:
        raise _refuse(model, around.problem)
    return Chain(
        backbone,
        layers,
        before,
        (*((backbone, child) for child in after), *around.heads),
        gives_tuple,
        around.encoders,
        tuple(name for name in inspect.signature(model.forward).parameters if around.encoders and name in INPUTS),
        _count_deep(model) if deep else 0,
    )


def _count_deep(model: Any) -> int:
    config = getattr(model.config, "vision_config", None)
    found = getattr(config, "deepstack_visual_indexes", None)
    if found is None:
        raise _refuse(model, "its config does not tell (`deepstack_visual_indexes`) how many layers add features")
    return len(found)


def _refuse(model: nn.Module, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"`pp_size` above 1 cannot cut {type(model).__name__} into pipeline stages: {reason}. Use `dp_shard_size` for "
        "large models and `sp_size` for long rows."
    )


def _find_loop(model: nn.Module, backbone: nn.Module, name: str) -> tuple[ast.For, ast.AST]:
    tree = hf.forward_tree(type(backbone))
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)] if tree is not None else []
    loops = [loop for loop in loops if name in _own_names(loop.iter)]
    if tree is None or len(loops) != 1:
        raise _refuse(model, f"the forward of {type(backbone).__name__} has no loop over `{name}`, or several")
    return loops[0], tree


def _own_names(node: ast.AST) -> set[str]:
    """Names after `self.` in a piece of code."""
    return {
        x.attr
        for x in ast.walk(node)
        if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id == "self"
    }


def _names(node: ast.AST) -> set[str]:
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}


def _adds_features(statement: ast.stmt, hidden: str, variables: list[str]) -> bool:
    """Whether a statement adds features of encoders to the hidden states, in layers that have some."""
    if not isinstance(statement, ast.If) or not hidden or statement.orelse or len(statement.body) != 1:
        return False
    (inner,) = statement.body
    stored = [x.id for x in ast.walk(inner) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
    read = _names(statement.test) & set(DEEP)
    return bool(read) and stored == [hidden] and _names(statement.test) <= read | {"range", "len", *variables}


def _read_loop(model: nn.Module, loop: ast.For, tree: ast.AST) -> tuple[bool, bool]:
    """Whether layers return tuples, and whether features are added to what some of them return.

    Raises UnsupportedError where more than hidden states goes from layer to layer.
    """
    variables = [x.id for x in ast.walk(loop.target) if isinstance(x, ast.Name)]
    hidden, result, deep = "", "", False
    for statement in loop.body:
        if isinstance(statement, ast.If) and _names(statement.test) <= _RECORDS:
            continue
        if result == hidden and _adds_features(statement, hidden, variables):
            deep = True
            continue
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if not isinstance(statement, ast.Assign) or not isinstance(target, ast.Name):
            raise _refuse(model, f"the loop over its layers has `{_first_line(statement)}` beside the call of a layer")
        call = statement.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == variables[-1]:
            given = [*call.args, *(k.value for k in call.keywords if k.arg == "hidden_states")][:1]
            if result or not given or not isinstance(given[0], ast.Name):
                raise _refuse(model, f"`{_first_line(statement)}` is no call of a layer on hidden states")
            hidden, result = given[0].id, target.id
            _check_handed(model, call, tree)
            _check_values(model, call, given[0], tree)
        elif result and target.id == hidden and ast.unparse(call) in (result, f"{result}[0]"):
            result = hidden if ast.unparse(call) == result else f"{result}[0]"
        elif {hidden, result, target.id, variables[-1]} & _names(call):
            raise _refuse(model, f"the loop over its layers has `{_first_line(statement)}` beside the call of a layer")
    if result not in (hidden, f"{result.removesuffix('[0]')}[0]") or not hidden:
        raise _refuse(model, "its layers do not return hidden states alone")
    return result.endswith("[0]"), deep


def _first_line(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0]


def _check_handed(model: nn.Module, call: ast.Call, tree: ast.AST) -> None:
    """Refuse a container that layers fill for each other (keys and values that Gemma 4's layers share)."""
    handed = {x.id for x in (*call.args, *(k.value for k in call.keywords if k.arg)) if isinstance(x, ast.Name)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name, value = node.targets[0].id, node.value
        empty = isinstance(value, (ast.Dict, ast.List)) and not ast.unparse(value).strip("{}[]")
        made = isinstance(value, ast.Call) and ast.unparse(value.func).endswith(("dict", "Dict", "list", "List"))
        if name in handed and (empty or made):
            raise _refuse(model, f"its layers hand `{name}` to each other beside their hidden states")


def _check_values(model: Any, call: ast.Call, hidden: ast.Name, tree: ast.AST) -> None:
    """Refuse what is made of the embeddings' values and handed to every layer (Zamba's `original_hidden_states`):
    stages after the first have zeros in place of them."""
    flow = ValueFlow(hf.find_backbone(model), ("inputs_embeds", hidden.id))
    flow.follow(tree)
    for value in (*call.args, *(k.value for k in call.keywords)):
        if value is not hidden and flow.depends(value):
            raise _refuse(
                model,
                f"its layers are handed `{_first_line(value)}` beside their hidden states, which depends on the "
                "embeddings, and the first stage alone has these",
            )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _sides(
    model: nn.Module, backbone: nn.Module, layers: str, loop: ast.For, tree: ast.AST
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Children of the backbone with parameters that run before its layers, and those that run after them."""
    before, after = [], []
    first, last = loop.lineno, loop.end_lineno or loop.lineno
    for name, child in backbone.named_children():
        if name == layers or not _has_parameters(child):
            continue
        lines = list(_lines(tree, name))
        if lines and max(lines) < first and hasattr(child, "embedding_dim"):
            before.append(name)
        elif lines and min(lines) > last:
            after.append(name)
        else:
            where = "before" if lines and max(lines) < first else "beside"
            raise _refuse(
                model,
                f"`{name}` ({type(child).__name__}) has parameters and runs {where} the layers, where a pipeline "
                "knows embeddings alone",
            )
    own = next((name for name, _ in backbone.named_parameters(recurse=False)), None)
    if own is not None:
        raise _refuse(model, f"`{own}` of {type(backbone).__name__} belongs to none of its layers")
    return tuple(before), tuple(after)


def _lines(tree: ast.AST, name: str) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == name and ast.unparse(node.value) == "self":
            yield node.lineno
