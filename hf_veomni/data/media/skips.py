"""Samples left out because an image or audio clip of theirs is broken: counted and named across loader workers."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import weakref

logger = logging.getLogger(__name__)

ON_ERROR = ("raise", "skip")


def check_on_error(value: object) -> None:
    """Raise ValueError for an unknown `on_error`."""
    if value not in ON_ERROR:
        raise ValueError(f"`on_error` ({value!r}) must be one of {', '.join(map(repr, ON_ERROR))}.")


class SkipLog:
    """What was skipped, by the message that names it. Workers append to one file, whatever way they were started; it
    is removed with the log that made it."""

    def __init__(self) -> None:
        handle, self._path = tempfile.mkstemp(prefix="hf-veomni-skipped-", suffix=".jsonl")
        os.close(handle)
        self._warned: set[str] = set()
        weakref.finalize(self, _remove, self._path, os.getpid())

    def add(self, message: str) -> None:
        """Count one more; each message is logged once a process."""
        with open(self._path, "ab", buffering=0) as file:
            file.write(json.dumps(message).encode() + b"\n")  # one write in append mode: workers do not mix lines
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("skipped a sample: %s", message)

    def counts(self) -> dict[str, int]:
        """How often each was skipped, in the order in which they were first."""
        counts: dict[str, int] = {}
        with open(self._path, "rb") as file:
            for line in file:
                message = json.loads(line)
                counts[message] = counts.get(message, 0) + 1
        return counts


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner and os.path.exists(path):
        os.remove(path)
