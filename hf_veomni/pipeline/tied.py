"""Tied embeddings: first and last stage have a copy each, under names of their own, which must take the same steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_veomni import hf
from hf_veomni.mesh import TIED, Tied

_MARK = "_omni_tie"  # on each parameter of a pipeline with tied embeddings: its `_Mark`
_NO_OPTIONS = ("params", "param_names", "name")  # of a group of an optimizer
_KINDS = (bool, int, float, str, tuple, list)  # that look the same on other ranks


class _Mark(NamedTuple):
    """`stages`: the ranks with this one's place in each stage; `name`: the first one of a tied parameter."""

    stages: dist.ProcessGroup
    name: str | None


def mark_tied(parameters: Iterable[nn.Parameter], stages: dist.ProcessGroup, tied: Tied) -> None:
    """Let an optimizer of these parameters be checked by `check_tied_groups`."""
    named = {id(parameter): names[0] for names, parameter in zip(tied.names, tied.parameters, strict=False)}
    for parameter in parameters:
        setattr(parameter, _MARK, _Mark(stages, named.get(id(parameter))))


def trained_bits(model: nn.Module) -> int:
    """Which tied parameters this stage trains, one bit each; 0 on stages that have none."""
    tied: Tied | None = getattr(hf.base_model(model), TIED, None)
    return 0 if tied is None else sum(p.requires_grad << bit for bit, p in enumerate(tied.parameters))


def check_trained(model: nn.Module, bits: Sequence[int]) -> None:
    """Raise ValueError where one of the two stages trains a tied parameter and the other does not.

    Args:
        bits: of each stage, by `trained_bits`.
    """
    tied: Tied | None = getattr(hf.base_model(model), TIED, None)
    for bit, names in enumerate(() if tied is None else tied.names):
        first, last = ("is trained" if found >> bit & 1 else "is frozen" for found in (bits[0], bits[-1]))
        if first != last:
            raise ValueError(
                f"'{names[0]}' {first} on the first stage, and {last} on the last one, which has its copy as "
                f"'{names[-1]}': set `requires_grad` by all of its names, or before `prepare_omni`."
            )


def check_tied_groups(param_groups: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError, on both stages alike, where an optimizer steps the copies of a tied parameter differently.

    Collective, if the parameters are those of a pipeline with tied embeddings: an all-gather of small objects over the
    stages.
    """
    stages: dist.ProcessGroup | None = None
    mine: dict[str, dict[str, Any]] = {}
    for group in param_groups:
        values = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in group.items() if k not in _NO_OPTIONS}
        options = {k: v for k, v in values.items() if v is None or isinstance(v, _KINDS)}
        for mark in filter(None, (getattr(parameter, _MARK, None) for parameter in group["params"])):
            stages = mark.stages
            if mark.name is not None:
                mine[mark.name] = options
    if stages is None:
        return
    found: list[Any] = [None] * stages.size()
    dist.all_gather_object(found, mine, group=stages)
    for name in dict.fromkeys([*found[0], *found[-1]]):
        first, last = found[0].get(name, {}), found[-1].get(name, {})
        if first != last:
            differ = [key for key in dict.fromkeys([*first, *last]) if first.get(key) != last.get(key)]
            said = [{key: each[key] for key in differ if key in each} or "no group" for each in (first, last)]
            raise ValueError(
                f"The optimizer has other options for '{name}' on the first stage ({said[0]}) than for its copy on "
                f"the last one ({said[1]}), and the two would drift apart: put all names of a tied parameter into "
                "groups with the same options."
            )


@contextmanager
def tied_gradients(model: nn.Module) -> Iterator[None]:
    """Around a window: what it adds to the gradients of tied embeddings is added up over the two stages that have
    them; gradients of windows before stay as they are. Collective over these two."""
    tied: Tied | None = getattr(hf.base_model(model), TIED, None)
    if tied is None:
        yield
        return
    trained = [parameter for parameter in tied.parameters if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    yield
    with torch.no_grad():
        for parameter, earlier in zip(trained, before, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            dist.all_reduce(local, group=tied.group)
            if earlier is not None:
                parameter.grad += earlier
