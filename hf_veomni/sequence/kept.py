"""Attention that activation checkpointing does not run again: what is expensive to compute or to send is kept.

    forward          q k v ~~~> all tokens | attention | ~~~> all heads
    kept                        q k v        out          out
    recomputation    q k v      read         read         read

A recomputation makes norms, projections and the rest of the layer again, as ever. In place of an exchange it gets what
that of the forward has brought, and in place of the attention's kernel its results: torch's selective checkpointing,
around the attention alone, where nothing gives way to another sequence in flight. So losses and gradients are the same
to the bit. A recomputation takes what it reads: a second backward through the same graph is an error, as torch has it.

A rank keeps (H + 2 G) D values a token of q, k and v, and 2 H D of the output, beside the C of the layer's input: with
32 heads, 8 of them keys and values, 3.5 times as much again; without an exchange those of the kernel's output alone.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from hf_veomni import hf
from hf_veomni.comm.all_to_all import Transport, running_transport
from hf_veomni.context import current, within
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.attention import can_cross
from hf_veomni.sequence.families.core import has_patch
from hf_veomni.sequence.ulysses import EXCHANGED, AttentionCall, ulysses_attention

RULE = "checkpointing"


class _Results:
    """Of one call of an attention, for its recomputation."""

    def __init__(self) -> None:
        self.ran = False
        self.arrived: dict[int, Tensor] = {}  # by the order of the launches
        self.kernels: list[tuple[AbstractContextManager, AbstractContextManager]] = []
        self.kept = [0]  # kernels

    def around_kernel(self, again: bool) -> AbstractContextManager:
        if again:
            return self.kernels.pop(0)[1]
        self.kernels.append(create_selective_checkpoint_contexts(partial(_choose, self.kept)))
        return self.kernels[-1][0]


def _choose(kept: list[int], context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    name = str(operator)
    if "attention" not in name and "attn" not in name:
        return CheckpointPolicy.PREFER_RECOMPUTE
    kept[0] += 1
    return CheckpointPolicy.MUST_SAVE


class _Ticket(NamedTuple):
    place: int
    inner: Any  # None where what it brings is there


class _KeepingTransport:
    """Within one call of an attention exchanges bring what those of its first forward have brought.

    The backward exchanges as ever: by then `open` is False.
    """

    def __init__(self, inner: Transport, results: _Results, again: bool) -> None:
        self.inner, self.results, self.again = inner, results, again
        self.open, self._started = True, 0

    def start(self, x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Any:
        if not self.open:
            return self.inner.start(x, group, send, receive)
        place, self._started = self._started, self._started + 1
        return _Ticket(place, None if self.again else self.inner.start(x, group, send, receive))

    def wait(self, ticket: Any) -> Tensor:
        if not isinstance(ticket, _Ticket):
            return self.inner.wait(ticket)
        if ticket.inner is None:
            return self.results.arrived.pop(ticket.place)
        out = self.inner.wait(ticket.inner)
        self.results.arrived[ticket.place] = out.detach()
        return out


def _recall(module: nn.Module) -> tuple[_Results, bool] | None:
    """What the call of an attention keeps, and whether it runs again; None outside of checkpointing.

    Raises:
        UnsupportedError: reentrant checkpointing, whose first forward has no gradients.
        RuntimeError: a second backward through the same graph.
    """
    recorded = current().recorded
    if recorded is None:
        return None
    if not torch.is_grad_enabled():
        raise UnsupportedError(
            f"The rule `{RULE}` ('keep') cannot be combined with reentrant activation checkpointing: use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or leave the rule out."
        )
    results = recorded.recall(_Results)
    again, results.ran = results.ran, True
    if again and not results.kernels:
        raise RuntimeError(
            f"A second backward through the same graph: what the rule `{RULE}` ('keep') had {type(module).__name__} "
            "keep was freed by the first one. Run the forward again, or leave the rule out."
        )
    return results, again


def _check_kept(results: _Results, module: nn.Module) -> None:
    if not results.kept[0]:
        raise UnsupportedError(
            f"The rule `{RULE}` ('keep') found no kernel of an attention in {type(module).__name__}, whose steps are "
            "computed one by one: select attention 'sdpa', or leave the rule out."
        )


def _exchanged(
    module: nn.Module,
    inner: Callable[..., Tensor],
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: dist.ProcessGroup,
) -> Tensor:
    """`inner`, an attention between exchanges, whose results are kept. Collectives: its; none in a recomputation."""
    found = _recall(module)
    if found is None:
        return inner(call, query, key, value, group)
    results, again = found

    def attend(*args: Any, **kwargs: Any) -> Any:
        with results.around_kernel(again):
            return call.inner(*args, **kwargs)

    transport = _KeepingTransport(running_transport(), results, again)
    with within(transport=transport):
        out = inner(replace(call, inner=attend), query, key, value, group)
    transport.open = False
    _check_kept(results, module)
    return out


def _alone(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Forward of an attention module without an exchange."""
    found = _recall(module)
    with nullcontext() if found is None else found[0].around_kernel(found[1]):
        out = forward(*args, **kwargs)
    if found is not None:
        _check_kept(found[0], module)
    return out


def _keep(module: nn.Module, exchanges: bool) -> Callable[[], Any]:
    """Returns what undoes it."""
    name = EXCHANGED if exchanges else "forward"
    before = vars(module).get(name)
    if exchanges:
        vars(module)[name] = partial(_exchanged, module, before or ulysses_attention)
    else:
        vars(module)[name] = partial(_alone, module, module.forward)
    return partial(_restore, module, name, before)


def _restore(module: nn.Module, name: str, before: object) -> None:
    if before is None:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = before


def find_kept(
    base: nn.Module, attentions: Sequence[nn.Module], state: ParallelState
) -> list[Callable[[], Callable[[], Any]]]:
    """What has attention modules keep their results by a plan's rules, and returns how to undo it.

    Args:
        attentions: of the backbone.

    Raises:
        UnsupportedError: a rule for what is no attention module that could keep anything.
    """
    names = {module: name for name, module in base.named_modules() if name}
    able = {names[m]: m for m in attentions if not (has_patch(m) or can_cross(m))}
    for pattern, rules in state.plan.modules.items():
        if RULE not in rules:
            continue
        hits = fnmatch.filter(able, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, able, n=3, cutoff=0.0)
            raise UnsupportedError(
                f"The rule `{RULE}` ({rules[RULE]!r}) for {pattern!r} has no effect: no attention module of "
                f"{type(base).__name__} that could keep its results has such a name. Near: {near}."
            )
        for name in hits:
            if hf.attention_name(getattr(able[name], "config", None) or base.config) == "eager":
                raise UnsupportedError(
                    f"The rule `{RULE}` ({rules[RULE]!r}) for {name!r} needs a kernel, and attention 'eager' has "
                    "none: select 'sdpa', or leave the rule out."
                )
    matched = state.plan.match_modules(names.values())
    return [partial(_keep, able[name], state.sp_size > 1) for name in able if RULE in matched.get(name, {})]
