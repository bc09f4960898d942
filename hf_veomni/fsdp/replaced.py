"""Parameters of a model as it was before it was sharded: whoever still holds them is told so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn


def _refuse() -> NoReturn:
    raise ValueError(
        "This parameter was replaced by a shard in `prepare_omni`, and what still holds it (an optimizer, a list for "
        "clipping) trains nothing: make it from the parameters of the model that `prepare_omni` returns, after the "
        "call."
    )


class ReplacedParameter(nn.Parameter):
    """What a parameter becomes once FSDP2 has put a shard in its place: looking at its gradient raises ValueError.

    Optimizers (`step`, `zero_grad`) and everything that clips read it, so that none of them does nothing in silence.
    """

    @property
    def grad(self) -> Any:  # type: ignore[override]
        _refuse()

    @grad.setter
    def grad(self, value: object) -> None:
        _refuse()


def mark_replaced(before: Iterable[nn.Parameter], model: nn.Module) -> None:
    """Mark those parameters of `before` that are none of the model's any more."""
    current = {id(parameter) for parameter in model.parameters()}
    for parameter in before:
        if id(parameter) not in current and type(parameter) is nn.Parameter:
            parameter.__class__ = ReplacedParameter


def check_not_replaced(param_groups: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError where an optimizer's groups hold parameters from before `prepare_omni`."""
    if any(isinstance(parameter, ReplacedParameter) for group in param_groups for parameter in group["params"]):
        _refuse()
