"""Which modules carry a state along the sequence, and how each of them is run on cut and packed sequences."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.context import current, within
from hf_veomni.errors import UnsupportedError
from hf_veomni.families import LIGHTNING, MIXERS
from hf_veomni.mesh import ParallelState
from hf_veomni.plan import ParallelPlan
from hf_veomni.sequence.families.lightning import check_lightning, run_lightning
from hf_veomni.sequence.hints import attends_by_name
from hf_veomni.sequence.mixers.functions import FUNCTIONS, MixerCall
from hf_veomni.sequence.mixers.replicated import run_gathered


@dataclass(frozen=True)
class Mixer:
    """A module that mixes tokens outside of the attention interface, and its scheme.

    Attributes:
        scheme: "functions", "lightning" or "gather".
        name: of the module in the model.
    """

    module: nn.Module
    scheme: str
    name: str


def find_scheme(module: nn.Module) -> str | None:
    """How a mixer can share rows without computing them more than once; None if nothing here knows it."""
    kind, names = type(module).__name__, set(hf.code_names(module))
    if kind in MIXERS:
        # A forward that was rewritten since would silently mix something else.
        return "functions" if names & FUNCTIONS.keys() else None
    return "lightning" if kind in LIGHTNING and check_lightning(module, names) else None


def find_mixers(layers: Sequence[tuple[str, nn.Module]], gathered: Set[nn.Module] = frozenset()) -> list[Mixer]:
    """The mixers in `layers`, given with their names; `gathered` are those that the plan has on full documents.

    Raises:
        UnsupportedError: a gathered module holds experts.
    """
    found: dict[nn.Module, Mixer] = {}
    inside: set[nn.Module] = set()
    for prefix, layer in layers:
        for path, module in layer.named_modules(prefix=prefix):
            scheme = "gather" if module in gathered else find_scheme(module)
            if module in inside or module is layer or scheme is None:
                continue
            found.setdefault(module, Mixer(module, scheme, path))
            inside.update(module.modules() if scheme == "gather" else ())
    for mixer in found.values():
        for name, module in mixer.module.named_modules(prefix=mixer.name):
            if mixer.scheme == "gather" and hf.is_experts_module(module):
                raise UnsupportedError(
                    f"The rule 'sp: gather' names `{mixer.name}`, of which `{name}` ({type(module).__name__}) is cut "
                    "in a way of its own: name only the module that mixes tokens."
                )
    return list(found.values())


@dataclass(frozen=True)
class Gathered:
    """What a plan runs on full documents.

    Attributes:
        modules: those that its rules name.
        names: of all modules of the model.
    """

    modules: frozenset[nn.Module]
    names: Mapping[nn.Module, str]

    @property
    def attend(self) -> bool:
        """Whether some of them are attentions, which take masks as tensors."""
        return any(find_scheme(m) is None and any(attends_by_name(part) for part in m.modules()) for m in self.modules)

    @classmethod
    def of(cls, model: nn.Module, plan: ParallelPlan) -> Gathered:
        """What the rules of `plan` name in `model`."""
        names = {module: name for name, module in model.named_modules()}
        rules = plan.match_modules(filter(None, names.values()))
        named = (name for name, rule in rules.items() if rule.get("sp") == "gather")
        return cls(frozenset(map(model.get_submodule, named)), names)

    def check(self, mixers: Iterable[Mixer]) -> None:
        """Raises UnsupportedError where a rule names a module that is not one of `mixers`, nor a part of one."""
        used = {module for mixer in mixers for module in mixer.module.modules()}
        unused = sorted(self.names[module] for module in self.modules - used)
        if unused:
            raise UnsupportedError(
                f"The rule 'sp: gather' names `{unused[0]}`, which is no module inside of a decoder layer: name the "
                "module that mixes tokens, for example '*.linear_attn'."
            )


# Parts that carry the name of a family, not of what they do.
_PLAIN = re.compile(r"(?i:norm|mlp|rotary|expert|router)")


def find_unknown(layer: nn.Module, pattern: re.Pattern[str], known: Set[nn.Module]) -> str | None:
    """Path in `layer` of a module that holds a convolution, or mixes tokens by the name of its class.

    Modules in `known`, and what holds such, are left out. Of modules inside of each other the innermost is named.
    """
    named: list[str] = []
    for path, module in layer.named_modules():
        kind = type(module).__name__
        if not known.isdisjoint(module.modules()):
            continue
        if isinstance(module, nn.Conv1d):
            return path.rpartition(".")[0]
        if pattern.search(kind) and not _PLAIN.search(kind):
            named.append(path)
    return next((path for path in named if not any(_is_inside(other, path) for other in named)), None)


def _is_inside(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(f"{outer}."))


def check_mixer_heads(mixers: Iterable[Mixer], sp_size: int) -> None:
    """Raises UnsupportedError where a mixer has fewer heads than `sp_size`."""
    for mixer in mixers:
        kind = type(mixer.module).__name__
        attribute = LIGHTNING[kind] if mixer.scheme == "lightning" else MIXERS.get(kind)
        if mixer.scheme == "gather" or attribute is None or sp_size <= (heads := getattr(mixer.module, attribute)):
            continue
        raise UnsupportedError(
            f"`sp_size` ({sp_size}) must not exceed the {heads} heads of `{mixer.name}` ({kind}): use at most "
            f"{heads}, or a rule of the plan, modules={{'*.{mixer.name.rpartition('.')[2]}': {{'sp': 'gather'}}}}, "
            "which computes the row up to sp times."
        )


def _replacement(function: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(inner)
    def replaced(*args: object, **kwargs: object) -> Any:
        call = current().mixer
        if call is None:  # another model of the process
            return inner(*args, **kwargs)
        with within(mixer=None):  # somebody may have wrapped one of these, and `acquire` that once more
            return function(call, inner, *args, **kwargs)

    return replaced


class FunctionRegistry:
    """Replaces functions of modelling files in place, and puts them back after the last user."""

    def __init__(self) -> None:
        self._users: WeakSet[Any] = WeakSet()
        self._originals: dict[tuple[str, str], tuple[Any, Any]] = {}

    def acquire(self, user: object, modules: Iterable[nn.Module]) -> None:
        """Replace what the forwards of `modules` call, also where somebody has put another function in our place.

        `user` is held weakly.
        """
        self._users.add(user)
        for module in modules:
            space = inspect.unwrap(type(module).forward).__module__
            for name in FUNCTIONS.keys() & set(hf.code_names(module)):
                original = getattr(sys.modules[space], name)
                if original is not self._originals.get((space, name), (None, None))[1]:
                    replaced = _replacement(FUNCTIONS[name], original)
                    setattr(sys.modules[space], name, replaced)
                    self._originals[space, name] = original, replaced

    def release(self, user: object) -> None:
        """Undo `acquire` of the last user, where nobody has replaced the function since."""
        self._users.discard(user)
        if self._users:
            return
        for (space, name), (original, replaced) in self._originals.items():
            if getattr(sys.modules[space], name) is replaced:
                setattr(sys.modules[space], name, original)
        self._originals.clear()


def run_mixer(module: nn.Module, scheme: str, state: ParallelState, /, *args: Any, **kwargs: Any) -> Any:
    """The forward of a mixer on this rank's tokens; stands in for `module.forward`.

    Raises:
        UnsupportedError: called outside of the prepared model's forward, where documents are not known; or with a
            cache that the model was not called with.
    """
    forward = partial(type(module).forward, module)
    row, documents = current().row, current().documents
    if row is None and current().call is not None:
        raise UnsupportedError(
            f"{type(module).__name__} runs outside of the backbone that cuts sequences, where documents and slices "
            "are not known. Use sp_size=1."
        )
    if row is None:
        raise UnsupportedError(
            f"{type(module).__name__} was called outside of the forward of its prepared model, where packed documents "
            "are not known: call the model; for activation checkpointing use `model.gradient_checkpointing_enable()`."
        )
    row.mixer_calls += 1
    if documents is None:
        return forward(*args, **kwargs)
    if any(kwargs.get(name) is not None for name in hf.CACHE_NAMES):
        raise UnsupportedError(
            f"{type(module).__name__} was given a cache, which holds the state of full rows: call the model without "
            "`cache_params`, or with `use_cache=True` under torch.no_grad()."
        )
    call = MixerCall(documents, row.layouts, state.sp_group, state.sp_rank, state.sp_size)
    if scheme == "gather":
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        return run_gathered(call, forward, inputs.pop(names[0]), inputs)
    kwargs = _cut_mask(call, kwargs)
    if scheme == "lightning":
        return run_lightning(call, module, *args, **kwargs)
    with within(mixer=call):
        return forward(*args, **kwargs)


def _cut_mask(call: MixerCall, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The padding mask [B, S] to this rank's [B, s]."""
    mask = kwargs.get("attention_mask")
    if call.size == 1 or not isinstance(mask, Tensor):
        return dict(kwargs)
    part = call.documents.row_length // call.size
    return {**kwargs, "attention_mask": mask.narrow(1, call.rank * part, part)}
