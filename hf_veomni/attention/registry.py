"""Which attention implementation the configs of prepared models select.

Models built from one config object share its selection, so it is counted: the first model that is prepared switches
it, the last one that is detached switches it back, and two of them cannot want different things. An unprepared model
on the same config sees the selection too, as it would see any other change of its config; "omni_varlen" computes the
same numbers there. Give models configs of their own (`copy.deepcopy(config)`) to keep them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError


class _Shared:
    """One config object: what it selected before, what its models were prepared with, and these models."""

    def __init__(self, config: object, option: str, previous: str) -> None:
        self.config, self.option, self.previous = config, option, previous
        self.users: WeakSet[Any] = WeakSet()


_shared: dict[int, _Shared] = {}  # by id; an entry keeps its config, so an id stays its own


def _entry(config: object) -> _Shared | None:
    entry = _shared.get(id(config))
    if entry is not None and not entry.users:  # its models were deleted without being detached
        hf.set_attention_name(config, entry.previous)
        del _shared[id(config)]
        return None
    return entry


def select(user: object, configs: Sequence[Any], option: str, replaced: Sequence[str], name: str) -> list[str]:
    """Have every config select `name` where it selects one of `replaced`, until the last user releases it.

    Args:
        user: whoever is prepared, held weakly.
        option: `attention` of `prepare_omni`; with "keep" nothing is switched.

    Returns:
        What each config selected before it was first switched.

    Raises:
        UnsupportedError: a config belongs to a prepared model with another option. Nothing is changed then.
    """
    for config in configs:
        entry = _entry(config)
        if entry is not None and entry.option != option:
            raise UnsupportedError(
                f"`attention` ({option!r}) must be {entry.option!r}, as for the prepared model that shares this "
                "model's config object: give one of them a config of its own, copy.deepcopy(config)."
            )
    attach_user(user, configs, option, [hf.attention_name(config) for config in configs])
    for config in configs:
        if option == "auto" and hf.attention_name(config) in replaced:
            hf.set_attention_name(config, name)
    return [_shared[id(config)].previous for config in configs]


def attach_user(user: object, configs: Sequence[Any], option: str, previous: Sequence[str]) -> None:
    """Count a user whose configs have been switched already: a deep copy of a prepared model."""
    for config, name in zip(configs, previous, strict=True):
        _shared.setdefault(id(config), _Shared(config, option, name)).users.add(user)


def release(user: object, configs: Sequence[Any]) -> None:
    """The user needs the selection no longer; without further users the previous one comes back."""
    for config in configs:
        entry = _shared.get(id(config))
        if entry is not None:
            entry.users.discard(user)
            if not entry.users:
                hf.set_attention_name(config, entry.previous)
                del _shared[id(config)]
