"""The folders into which a run saves, on the rank that writes: its own, clean, with as many checkpoints as asked."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

from hf_veomni.checkpoint.manifest import recover, remove_aside
from hf_veomni.trainer.folders import put_surplus_aside
from hf_veomni.trainer.in_use import confirm, sole_use


class HeldFolders:
    """Those that a `train` has locked. Nothing here is a collective."""

    def __init__(self) -> None:
        self._locks = ExitStack()
        self._roots: set[Path] = set()
        self._freeing: threading.Thread | None = None

    def hold(self, root: Path) -> None:
        """Keep other runs from it until `close`, also where this one has had it since: see `confirm`.

        Raises:
            ValueError: another run has it.
            OSError: it cannot be made.
        """
        if root not in self._roots or not confirm(root):
            self._locks.enter_context(sole_use(root))
            self._roots.add(root)

    def clean(self) -> None:
        """Bring back what was complete, and remove what a killed run has left, or this one has put aside."""
        self._join()
        for root in self._roots:
            recover(root)

    def rotate(self, written: Path, limit: int | None, best: str | None, beside: bool) -> None:
        """Remove checkpoints around the one just written: see `put_surplus_aside`.

        Args:
            beside: free their disk in a thread; it takes as long as a copy of them in memory.
        """
        self._join()
        if put_surplus_aside(written.parent, limit, written, best):
            self._freeing = threading.Thread(target=remove_aside, args=(written.parent,))
            self._freeing.start()  # not a daemon: the interpreter waits for it at its end
        if not beside:
            self._join()

    def _join(self) -> None:
        thread, self._freeing = self._freeing, None
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """Wait for what is being removed, and give the folders to other runs."""
        self._join()
        self._roots.clear()
        self._locks.close()
