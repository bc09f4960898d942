"""Towers with FSDP units of their own: all ranks run each tower as often as the one that runs it most.

A unit's parameters are gathered by all ranks together, but a row without images runs no vision tower. So the ranks
agree, and those with less to encode run the tower on ones in the shape of an item that another rank has had:

    forward of the module with the `get_*_features`    one all-reduce: which of them any rank will call
    each of these, in the order of that forward        one all-reduce: how often; once in a run, the shape of an item
    backbone                                           what is left to run; the loss hangs on the outputs by zeros

The order is that of the forward's code, so that passes meet on ranks whose rows differ, and their backwards too, which
run in the reverse order of creation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_veomni import hf
from hf_veomni.mesh import ParallelState

# What a forward takes where its row has items; the methods' own names for it differ by family.
_INPUTS = {
    "get_image_features": "pixel_values",
    "get_video_features": "pixel_values_videos",
    "get_audio_features": "input_features",
}
FEATURES = ("pooler_output", "last_hidden_state")  # the first that is there
Arguments = dict[str, Any]


class TowerPasses:
    """Keeps the ranks in step; one for each module that owns `get_*_features` methods.

    No closures: a deep copy of the model gets one of its own.
    """

    def __init__(self, owner: nn.Module, state: ParallelState) -> None:
        self.state = state
        self.methods = [name for name in hf.code_names(owner) if name in _INPUTS]  # in the order of the calls
        self.parameters = list(inspect.signature(type(owner).forward).parameters)
        self.templates: dict[str, Arguments] = {}
        self.waiting: list[str] = []
        self.donors: dict[str, int] = {}
        self.loose: list[Tensor] = []

    def begin(self, owner: object, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the owner: agree on the methods that this step needs. An all-reduce over the stage."""
        inputs = {**dict(zip(self.parameters, args[: len(self.parameters)], strict=False)), **kwargs}
        has = [inputs.get(_INPUTS[name]) is not None for name in self.methods]
        lacks = [name not in self.templates for name in self.methods]
        rank = dist.get_rank()
        found = self._most([rank if x else -1 for x in has] + [int(x) for x in lacks])
        donors, lacking = found[: len(has)], found[len(has) :]
        self.waiting = [name for name, donor in zip(self.methods, donors, strict=True) if donor >= 0]
        self.donors = {
            name: donor for name, donor, lack in zip(self.methods, donors, lacking, strict=True) if donor >= 0 and lack
        }
        self.loose = []

    def run(self, owner: object, name: str, calls: Sequence[Arguments], smallest: Arguments) -> list[Any]:
        """Outputs of the stock method for each of `calls`, after as many passes as other ranks have more.

        Args:
            smallest: a call for a single item, the least expensive one, whose shape others may need.

        Collective: an all-reduce of one integer, and at first a broadcast of an item's shape.
        """
        if name not in self.waiting:  # called by itself, outside of a forward
            return [self._call(owner, name, call) for call in calls]
        self._catch_up(owner, name)
        return self._pass(owner, name, calls, smallest)

    def finish(self, owner: object) -> list[Tensor]:
        """Run what this rank's row had no call for; the outputs on which the loss must hang for the backward."""
        self._catch_up(owner, None)
        loose, self.loose = self.loose, []
        return loose

    def _catch_up(self, owner: object, name: str | None) -> None:
        while self.waiting and self.waiting[0] != name:
            self._pass(owner, self.waiting[0], [], None)

    def _pass(self, owner: object, name: str, calls: Sequence[Arguments], smallest: Arguments | None) -> list[Any]:
        self.waiting.remove(name)
        if name in self.donors:
            template = [None if smallest is None else _template(smallest)]
            group, source = self.state.stage_group, self.donors.pop(name)
            dist.broadcast_object_list(template, src=source, group=group, device=self.state.device)
            assert template[0] is not None
            self.templates[name] = template[0]
        missing = self._most([len(calls)])[0] - len(calls)
        outputs = [self._call(owner, name, call) for call in calls]
        for _ in range(missing):
            output = self._call(owner, name, _ones(self.templates[name], self.state.device))
            # Nothing else: what the model does not read has no gradient on the ranks that have items either.
            self.loose += [tensor for tensor in tree_leaves(used_features(output)) if tensor.requires_grad]
        return outputs

    @staticmethod
    def _call(owner: object, name: str, call: Arguments) -> Any:
        return getattr(type(owner), name).__get__(owner)(**call)

    def _most(self, numbers: list[int]) -> list[int]:
        """The maximum of each number over all ranks, of a pipeline over those of its first stage."""
        found = torch.tensor(numbers, device=self.state.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.state.stage_group)
        return found.tolist()


def used_features(output: Any) -> list[Any]:
    """What the model reads of a `get_*_features` output: the features proper, then those of each deep layer."""
    if isinstance(output, Tensor):
        return [output]
    first = next((output.get(name) for name in FEATURES if output.get(name) is not None), None)
    return [first, *(output.get("deepstack_features") or ())]


def units_of(owner: nn.Module, prefix: str, rules: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Names of modules with an `fsdp` rule that a `get_*_features` method of the owner runs, below it."""
    used = {name for method in _INPUTS for name in _names_in(owner, method)}
    inside = [(name, name.removeprefix(prefix + ".") if prefix else name) for name in rules if "fsdp" in rules[name]]
    return [name for name, below in inside if (not prefix or below != name) and below.split(".")[0] in used]


def why_not(owner: nn.Module) -> str | None:
    """Why the ranks cannot be kept in step for an owner of `get_*_features`; None where they can."""
    taken = inspect.signature(type(owner).forward).parameters
    called = set(hf.code_names(owner))
    for name, needed in _INPUTS.items():
        if callable(getattr(type(owner), name, None)) and (name not in called or needed not in taken):
            return f"{type(owner).__name__}.forward takes no `{needed}` or does not call `{name}` itself"
    return None


def _names_in(owner: nn.Module, method: str) -> tuple[str, ...]:
    function: Callable[..., Any] | None = getattr(type(owner), method, None)
    return () if function is None else inspect.unwrap(function).__code__.co_names


def _template(call: Arguments) -> Arguments:
    """What a rank without such an item needs to run the method: shapes of real values, and all others as they are."""
    return tree_map_only(Tensor, lambda x: x.detach().to("meta") if x.is_floating_point() else x.cpu(), call)


def _ones(template: Arguments, device: torch.device) -> Arguments:
    """Ones and not zeros, which some families take for the padding between images."""
    return tree_map_only(Tensor, lambda x: torch.ones_like(x, device=device) if x.is_meta else x.to(device), template)
