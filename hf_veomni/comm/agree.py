"""An error on one rank becomes an error on every rank: otherwise the others deadlock in the next collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from hf_veomni.errors import public_kind


def name_ranks(ranks: list[int]) -> str:
    """As a message names them: "rank 1", "ranks 0, 2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agree(error: Exception | None, what: str) -> None:
    """Raise on every rank if `error` is set on any of them.

    Args:
        error: what went wrong on this rank, or None.
        what: the job in words, for the message on the ranks where nothing went wrong.

    Collective: one all-gather of small objects over all ranks.

    Raises:
        Exception: `error` itself on its own rank; elsewhere an UnsupportedError, ValueError, OSError or RuntimeError
            that names the ranks and repeats the message of the first one.
    """
    if _world_size() == 1:
        if error is not None:
            raise error
        return
    mine = None if error is None else (public_kind(error), f"{type(error).__name__}: {error}")
    reports: list[tuple[type[Exception], str] | None] = [None] * _world_size()
    dist.all_gather_object(reports, mine)
    if error is not None:
        raise error
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if (report := next(filter(None, reports), None)) is not None:
        kind, message = report
        raise kind(f"{what} failed on {name_ranks(failed)}: {message}")


def meet(what: str, turn: int, limit: timedelta) -> None:
    """Wait until every rank has come here, so that a call on the main process alone does not deadlock.

    Args:
        what: the call in words.
        turn: how many calls of it came before in this process, the same on all ranks.

    Raises:
        ValueError: some ranks have not come within `limit`.
    """
    store = distributed_c10d._get_default_store()
    keys = [f"hf_veomni/{what}/{turn}/{rank}" for rank in range(_world_size())]
    store.set(keys[dist.get_rank()], "here")
    try:
        store.wait(keys, limit)
    except RuntimeError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise ValueError(
            f"`{what}` was not called on ranks {missing} within {limit.total_seconds():.0f} s: it gathers what each "
            "rank has, so every rank must call it, outside of `if accelerator.is_main_process:`. Rank 0 writes."
        ) from error


@contextmanager
def together(what: str) -> Iterator[None]:
    """Run a block that holds no collective; if it raises on one rank, every rank raises after it.

    Collective: one all-gather of small objects over all ranks at the end of the block.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # every kind: whatever it is, the other ranks must hear of it
        error = caught
    agree(error, what)
