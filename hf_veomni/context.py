"""What runs now: one immutable context of the running forward, in the package's one ContextVar.

    step              idle
    generate          generating
    prepared model    call, router_loss, ids
      tower           encoding
      backbone        row, documents
        mixer         mixer

A backward runs outside of them all, on a GPU even in a thread of its own, where no ContextVar is set. What activation
checkpointing runs again there has the context of its first forward, and what that has recorded (`CheckpointCarrier`).

Whoever enters fields leaves them again; in between whatever runs finds them in `current()`. Attention, sequences,
experts and towers all read the context, so it stands below all of them and knows them by their types alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_veomni.attention.documents import Documents
    from hf_veomni.comm.all_to_all import Transport
    from hf_veomni.pairs import Lane
    from hf_veomni.sequence.mixers.functions import MixerCall

T = TypeVar("T")


@dataclass(eq=False)
class Row:
    """What one forward of one backbone works on. `full`: no slicing, every rank of the SP group runs the full row."""

    owner: object  # the SequenceAttachment
    length: int
    padded: int
    full: bool
    cut: bool = False  # whether a layer has got its slice
    gathered: bool = False  # whether the layers' output has been put together again
    layouts: dict[Any, Any] = field(default_factory=dict)  # index tensors, made once for all mixers
    mixer_calls: int = 0


@dataclass(eq=False)
class Call:
    """One call of a prepared model, around that of its backbone."""

    owner: object  # the SequenceAttachment
    cached: bool  # whether a cache was asked for; some families hand their backbone the default of their config
    generating: bool  # whether it comes from the model's own `generate`
    positions: Tensor | None  # Mamba's model does not hand them on to its backbone
    row: Row | None = None  # the last one that its backbone was called with


class Encoding(NamedTuple):
    """A call of a `get_*_features` method, or of an encoder of an OmniModel.

    Attributes:
        config: of the method's owner.
        modality: "image", "video" or "audio"; None for an OmniModel's encoder.
        cut: whether the tower's patches are cut over the SP ranks.
    """

    config: Any
    modality: str | None
    cut: bool


class Recorded:
    """What a checkpointed call makes, for its recomputations to have again in the same order."""

    def __init__(self, made: list[Any], again: bool) -> None:
        """`made`: of the forward, which appends to it; `again`: what runs is a recomputation."""
        self._made, self._again = made, iter(made) if again else None

    def recall(self, make: Callable[[], T]) -> T:
        """`make()`; in a recomputation what the forward has made in its place."""
        if self._again is not None:
            return next(self._again)
        self._made.append(make())
        return self._made[-1]


class _Entry(NamedTuple):
    owner: object
    before: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """The running forward, as far as it goes beyond the arguments of a module.

    Attributes:
        idle: the batch only keeps a rank in step; its tokens are routed and computed, and count nowhere.
        generating: models whose `generate` runs, the innermost last.
        call: of a prepared model.
        router_loss: in place of the family's load-balancing loss.
        ids: `input_ids` [B, S] of the prepared model's call, unless every rank runs the full row in it.
        encoding: the method that turns items into features, where it runs on a share of them.
        row: that a backbone works on; None outside of it, and where a user's own means of checkpointing run layers
            again.
        documents: packed in the row [B, S]; masks are created from them. None where every rank runs the full row.
        mixer: the call that the functions of its modelling file serve; None leaves them as they are.
        recorded: of the checkpointed call that runs; None outside of any.
        transport: of exchanges between ranks; None: their process groups.
        flight: of two sequences that run side by side the one that this is.
        lane: the same, where it gives way to the other one: within the backbones of prepared models.
        stage: the micro-batch of a pipeline that runs through this rank's stage.
        dropout: the random stream of the prepared model's call, and what tells whether it was drawn from.
        entries: what `leave` puts back, the innermost first.
    """

    idle: bool = False
    generating: tuple[nn.Module, ...] = ()
    call: Call | None = None
    router_loss: Callable[..., Any] | None = None
    ids: Tensor | None = None
    encoding: Encoding | None = None
    row: Row | None = None
    documents: Documents | None = None
    mixer: MixerCall | None = None
    recorded: Recorded | None = None
    transport: Transport | None = None
    flight: Lane | None = None
    lane: Lane | None = None
    stage: Any = None
    dropout: Any = None
    entries: tuple[_Entry, ...] = ()


_NOTHING = ForwardContext()
_current: ContextVar[ForwardContext] = ContextVar("hf_veomni_forward", default=_NOTHING)
# The context of the forward that runs; an empty one outside of any.
current = _current.get


def enter(owner: object, **fields: object) -> None:
    """Set fields of the context, until `leave(owner)`."""
    now = current()
    entry = _Entry(owner, {name: getattr(now, name) for name in fields})
    _current.set(replace(now, entries=(entry, *now.entries), **fields))


def leave(owner: object) -> None:
    """Put back what the last `enter(owner)` has set; nothing where there was none (its hook raised before).

    Fields of other owners stay, since torch runs the hooks after a forward in the order of those before it; where two
    enter the same field, the last one leaves first.
    """
    now = current()
    entry = next((entry for entry in now.entries if entry.owner is owner), None)
    if entry is not None:
        left = tuple(other for other in now.entries if other is not entry)
        _current.set(replace(now, entries=left, **entry.before))


def is_inside(owner: object) -> bool:
    """Whether `owner` has entered fields and not left them."""
    return any(entry.owner is owner for entry in current().entries)


@contextmanager
def within(**fields: object) -> Iterator[None]:
    """Set fields of the context for the time of a block."""
    owner = object()
    enter(owner, **fields)
    try:
        yield
    finally:
        leave(owner)


def leave_when_interrupted(model: nn.Module) -> Callable[[], None]:
    """Have hooks that are always called be called after Ctrl-C, too: torch calls them after an Exception alone.

    Without it a notebook would go on with the fields, the random stream and the counters of the interrupted forward.

    Returns:
        A function that takes this off again.
    """
    hooked = [module for module in model.modules() if module._forward_hooks_always_called]
    hooked = [module for module in hooked if "_call_impl" not in vars(module)]
    for module in hooked:
        vars(module)["_call_impl"] = MethodType(_call, module)
    return partial(_call_as_torch, hooked)


def _call(module: Any, *args: object, **kwargs: object) -> Any:
    stock = type(module)._call_impl
    if torch.compiler.is_compiling():  # torch calls none after an error either
        return stock(module, *args, **kwargs)
    try:
        return stock(module, *args, **kwargs)
    except Exception:
        raise
    except BaseException:
        for handle, hook in list(module._forward_hooks.items()):
            if handle in module._forward_hooks_always_called:
                inputs = (args, kwargs) if handle in module._forward_hooks_with_kwargs else (args,)
                with suppress(Exception):  # another one is on its way
                    hook(module, *inputs, None)
        raise


def _call_as_torch(hooked: Iterable[nn.Module]) -> None:
    for module in hooked:
        vars(module).pop("_call_impl", None)


def is_generating(model: nn.Module) -> bool:
    """Whether the call of `model` comes from its own `generate`."""
    return any(one is model for one in current().generating)


def is_cut() -> bool:
    """Whether layers see slices; the rule where nothing is known of the row."""
    row = current().row
    return row is None or not row.full


def recall(make: Callable[[], T]) -> T:
    """`make()`; in a recomputation what the call that is run again has made in its place."""
    recorded = current().recorded
    return make() if recorded is None else recorded.recall(make)


class CheckpointCarrier:
    """A checkpointing function under which the recomputation has the context of the first forward."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        """`inner`: called as `inner(function, *args)`, as transformers calls torch's checkpoint."""
        self.inner = inner

    @torch.compiler.disable(recursive=False)  # a compiler cannot follow a ContextVar; the function itself it can
    def __call__(self, function: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        carried, lane = _Carried(function), current().lane
        if lane is None:
            return self.inner(carried, *args, **kwargs)
        return lane.checkpoint(self, partial(self.inner, **kwargs), carried, *args)


class _Carried:
    """What is checkpointed; called once in the forward, and again for each backward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.context = function, current()
        self.made: list[Any] = []
        self.ran = False

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: object, **kwargs: object) -> Any:
        recorded, self.ran = Recorded(self.made, again=self.ran), True
        now = current()  # who runs beside it is another one in each recomputation
        token = _current.set(replace(self.context, recorded=recorded, flight=now.flight, lane=now.lane))
        try:
            return self.function(*args, **kwargs)
        finally:
            _current.reset(token)
