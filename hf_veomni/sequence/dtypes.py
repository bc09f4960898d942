"""A note on torch's error about two dtypes: which module met which tensor, and the ways out."""

from __future__ import annotations

import traceback

import torch
from torch import Tensor, nn


def explain_dtypes(model: nn.Module, error: BaseException | None) -> None:
    """Add a note to an error that a module's weights and its input have different dtypes; leave others as they are.

    The usual case is a projector that is trained in fp32 behind a frozen encoder in bf16, which stock models refuse
    in the same place, naming neither.
    """
    if not isinstance(error, RuntimeError) or "type" not in str(error):
        return
    names = {module: name for name, module in model.named_modules()}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = frame.f_locals.get("self")
        if not isinstance(module, nn.Module) or module not in names:
            continue
        held = {p.dtype for p in module.parameters(recurse=False) if p.is_floating_point()}
        given = {x.dtype for x in frame.f_locals.values() if isinstance(x, Tensor) and x.is_floating_point()} - held
        if len(held) == 1 and len(given) == 1:
            error.add_note(_note(names[module], held.pop(), given.pop()))
            return


def _note(name: str, held: torch.dtype, given: torch.dtype) -> str:
    weights, inputs = (str(dtype).removeprefix("torch.") for dtype in (held, given))
    return (
        f"`{name}` has weights in {weights} and was given {inputs}: both must have one dtype. Convert the module to "
        "that of its input, or what comes before it to that of its weights (a projector together with its encoder), "
        "or compute under autocast (`bf16=True`)."
    )
