"""Directories that appear complete or not at all, and files that turn out to be damaged."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from hf_veomni.checkpoint.manifest import flush

_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
INSIDE = "_incomplete"  # with the underscore that keeps it out of what Trainer uploads


def _publish(staging: Path, directory: Path) -> None:
    """Move what was written into its place; weights of an earlier save that it does not replace are removed."""
    for path in staging.rglob("*"):
        flush(path)
    if not directory.exists():
        os.rename(staging, directory)
        flush(directory.parent)
        return
    written = {entry.name for entry in staging.iterdir()}
    for entry in sorted(staging.iterdir()):
        target = directory / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(entry, target)
    for entry in directory.iterdir():
        if _WEIGHTS.fullmatch(entry.name) and entry.name not in written:
            entry.unlink()
    staging.rmdir()
    flush(directory)


@contextmanager
def staged(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory to write into; its files move to `directory` in one go when the block ends well.

    Whatever goes wrong inside (a full disk, an interrupt), the staging directory is removed and `directory` is as it
    was. Not a collective: call it on the rank that writes.

    Raises:
        ValueError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"`{directory}` is a file: name a directory to save to, or remove the file.")
    # One that exists is not left: it may be a mount or a link, and what is beside it another disk, or not ours.
    staging = directory / INSIDE if directory.exists() else directory.parent / f".{directory.name}.incomplete"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        _publish(staging, directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def naming_damage(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around what reads a file of torch or safetensors, whose own errors name none.

    Raises:
        ValueError: the file is cut off or damaged, or would run code.
    """
    try:
        yield
    except (SafetensorError, RuntimeError, UnpicklingError, EOFError, KeyError, OSError) as error:
        text = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"'{path}' cannot be read ({type(error).__name__}: {text}): it is cut off or damaged. Use an earlier "
            "checkpoint."
        ) from error
