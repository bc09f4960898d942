"""One run at a time in an `output_dir`: two would clean up, replace and remove each other's checkpoints.

The rank that writes locks a file there while it trains. The lock is the system's and ends with the process, whatever
ends that; a file that is left behind means nothing. It is a record lock: workers of a killed trainer, which outlive it
by seconds, do not keep it, and network file systems know it across machines. A process has such a lock but once, and
loses it with the first descriptor of the file that it closes, so it is counted here for several trainers of a process,
and taken again by `confirm`, since others close such descriptors, too: whoever copies the folder does.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

IN_USE = "_in_use.json"  # with the underscore that keeps a file out of what Trainer uploads
_WAIT = 5.0  # seconds that a run gets which is about to end
_PERIOD = 0.2


@dataclass
class _Held:
    """A lock of this process. `descriptor`: None where there are no locks."""

    descriptor: int | None
    users: int = 0


_held: dict[tuple[int, int], _Held] = {}  # by device and inode of the folder
os.register_at_fork(after_in_child=_held.clear)  # a lock stays with the parent


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keep other processes from training into `folder`, which is made. Within one process it may be nested.

    A file system that refuses locks gives a warning. Not a collective: call it on the rank that writes.

    Raises:
        ValueError: another process has it; its machine, process id and start are named.
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key, owner = _key(folder), os.getpid()
    if key not in _held:
        _held[key] = _Held(_lock(folder / IN_USE))
    held = _held[key]
    held.users += 1
    try:
        yield
    finally:
        held.users -= 1
        if not held.users and os.getpid() == owner:
            del _held[key]
            _release(held.descriptor, folder / IN_USE)


def confirm(folder: Path) -> bool:
    """Have the lock still, or again, of a folder in `sole_use`. False where that folder is gone, or is another one.

    Raises:
        ValueError: another process has it by now.
    """
    held = _held.get(_key(folder)) if folder.is_dir() else None
    if held is None:
        return False
    if held.descriptor is not None and (_is_lost(held.descriptor) or not _is_at(held.descriptor, folder / IN_USE)):
        os.close(held.descriptor)
        held.descriptor = None
        held.descriptor = _lock(folder / IN_USE)
    return True


def _key(folder: Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _is_lost(descriptor: int) -> bool:
    """Whether another process has taken it; else it is ours again, where there are locks."""
    try:
        return not _try_lock(descriptor)
    except OSError:
        return False


def _lock(path: Path) -> int | None:
    """The descriptor that holds the lock; None where there are no locks."""
    end = time.monotonic() + _WAIT
    while True:
        descriptor = None
        try:
            descriptor = _open(path)
            if descriptor is not None and _try_lock(descriptor) and _is_at(descriptor, path):
                me = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M}"}
                with suppress(OSError):  # a disk that is full
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, json.dumps(me).encode())
                return descriptor
        except OSError as error:
            logger.warning(
                f"'{path}' cannot be locked ({error.strerror}): nothing keeps a second run from writing to "
                "`output_dir` at the same time, which would damage the checkpoints of both."
            )
            return descriptor
        if descriptor is not None:
            os.close(descriptor)
        if time.monotonic() > end:
            raise ValueError(
                f"`output_dir` ('{path.parent}') is in use by another run ({_holder(path)}): two would remove each "
                f"other's checkpoints. End that one, or name another folder. If its machine is gone, remove '{path}'."
            )
        time.sleep(_PERIOD)


def _open(path: Path) -> int | None:
    """None where it is another user's, whose process has it, or had: then it is removed."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError as refused:
        try:
            reading = os.open(path, os.O_RDONLY)
        except OSError:
            raise refused from None
    try:
        if _try_lock(reading, fcntl.LOCK_SH) and _is_at(reading, path):  # which keeps its owner from locking it
            path.unlink()
    finally:
        os.close(reading)
    return None


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes: another process has it
        return False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the file is the one of that name still: whoever had the lock may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        told = json.loads(path.read_text())
        return f"process {told['pid']} on {told['host']}, since {told['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which"


def _release(descriptor: int | None, path: Path) -> None:
    if descriptor is None:
        return
    with suppress(OSError):  # a disk that became read-only
        if not _is_lost(descriptor) and _is_at(descriptor, path):
            path.unlink()
    os.close(descriptor)
