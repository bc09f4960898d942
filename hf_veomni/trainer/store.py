"""Small messages between ranks that need no collective: over the store by which the process group was made."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


class Board:
    """Messages of one occasion. Every rank makes one, in the same order.

    Args:
        name: of the occasion.
        clone: use a connection of its own, for a thread beside the main one.
    """

    def __init__(self, name: str, clone: bool = False) -> None:
        store: Any = distributed_c10d._get_default_store()
        self._store = store.clone() if clone else store
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # Counted in the store, since a process may join one world after the other.
        self._prefix = f"hf_veomni/{name}/{self._store.add(f'hf_veomni/{name}/turns/{self.rank}', 1)}"

    def post(self, key: str, value: Any) -> None:
        """Leave a message, in place of an earlier one."""
        self._store.set(f"{self._prefix}/{key}", json.dumps(value))

    def read(self, key: str) -> Any:
        """The message of this key; None if there is none. Does not wait."""
        name = f"{self._prefix}/{key}"
        return json.loads(self._store.get(name)) if self._store.check([name]) else None

    def gather(self, key: str, value: Any, limit: float) -> list[Any]:
        """`value` of every rank, in rank order. Every rank calls it.

        Args:
            limit: seconds to wait for the others.

        Raises:
            TimeoutError: not all have come, or one has waited in vain before; it names those that are missing.
        """
        self.post(f"{key}/{self.rank}", value)
        names = [f"{self._prefix}/{key}/{rank}" for rank in range(self.world)]
        try:
            self._store.wait(names, timedelta(seconds=limit))
        except RuntimeError as error:
            missing = [rank for rank, name in enumerate(names) if not self._store.check([name])]
            self.post(f"{key}/given up", self.rank)
            raise TimeoutError(f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}") from error
        if (gone := self.read(f"{key}/given up")) is not None:  # this rank came too late
            raise TimeoutError(f"rank {gone}, which has not waited any longer")
        return [json.loads(self._store.get(name)) for name in names]
