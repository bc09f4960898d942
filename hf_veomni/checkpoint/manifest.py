"""What makes a checkpoint complete: a manifest of its files, written last, and directories that reach the disk.

A checkpoint is written beside its place, flushed, described by its manifest, and then renamed. Whatever ends the
process before the rename leaves the earlier checkpoints as they were; whatever ends it after leaves the new one
complete.

    output_dir/.incomplete/checkpoint-8/...            written and flushed
    output_dir/.incomplete/checkpoint-8/manifest.json  files, bytes and checksums, flushed
    output_dir/checkpoint-8                            renamed, its parent flushed
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

MANIFEST = "manifest.json"
STAGING = ".incomplete"
REMOVED = "_removed-"  # and something random: checkpoints whose disk is to be freed, which Trainer does not upload
_THREADS = 8  # hashing leaves the interpreter free; large models lie in several files
Digest = tuple[int, str]  # bytes and SHA-256 of a file


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST)


def names_within(path: Path, directory: Path) -> bool:
    """Whether a path that a stranger may have written stays in its folder. Links count as files: caches hold them."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(directory))


def checksum(path: Path) -> str:
    """What `sha256sum` prints."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(paths: list[Path]) -> list[str]:
    """SHA-256 of files, several at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(checksum, paths))


def flush(path: Path) -> None:
    """Have a file's contents, or a directory's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(directory: Path, known: Mapping[str, Digest] | None = None) -> None:
    """Flush everything below `directory` and describe it in its manifest, which is flushed last.

    Args:
        known: files, by their path in it, that were flushed already, with what was written to them. They are not read
            again.

    Raises:
        OSError: no space, or the disk does not take it; or a known file is not there as it was written.
    """
    digests = dict(known or {})
    for name, (size, _) in digests.items():
        if (found := (directory / name).stat().st_size) != size:
            raise OSError(f"'{directory / name}' has {found} bytes, but {size} were written to it.")
    files = [path for path in _files(directory) if path.relative_to(directory).as_posix() not in digests]
    for path in files:
        flush(path)
    for path, digest in zip(files, checksums(files), strict=True):
        digests[path.relative_to(directory).as_posix()] = path.stat().st_size, digest
    entries = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(digests.items())}
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "files": entries}, indent=1) + "\n")
    flush(manifest)
    for folder in (path for path in directory.rglob("*") if path.is_dir()):
        flush(folder)
    flush(directory)


def find_damage(directory: Path, *, contents: bool = False) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is complete.

    Args:
        contents: compare checksums too, which reads every file. Sizes are always compared.
    """
    try:
        stored = json.loads((directory / MANIFEST).read_text())["files"]
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in stored.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if not entries:
        return f"its {MANIFEST} names no file"
    for name, (size, _) in entries.items():
        if "\0" in name or not names_within(directory / name, directory):
            return f"its {MANIFEST} names a file outside of it ('{name}')"
        if (damage := _damage_of(directory / name, name, size)) is not None:
            return damage
    if contents:
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = {name: digest for name, (_, digest) in entries.items()}
            found = pool.map(lambda name: _changed(directory / name, name, digests[name]), digests)
            return next(filter(None, found), None)
    return None


def _unreadable(name: str, error: OSError) -> str:
    return f"'{name}' cannot be read ({error.strerror or error})"


def _damage_of(path: Path, name: str, size: object) -> str | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return f"'{name}' is missing"
    except OSError as error:
        return _unreadable(name, error)
    if not stat.S_ISREG(found.st_mode):
        return f"'{name}' is missing"
    return None if found.st_size == size else f"'{name}' has {found.st_size} bytes, not {size}"


def _changed(path: Path, name: str, digest: object) -> str | None:
    try:
        return None if checksum(path) == digest else f"the contents of '{name}' have changed (checksum)"
    except OSError as error:  # a bad sector
        return _unreadable(name, error)


def publish(staging: Path, directory: Path) -> None:
    """Rename a complete checkpoint into its place. One that is there already is replaced.

    A process that ends in between leaves both in `STAGING`, from where `recover` brings them back.
    """
    if directory.exists():
        replaced = staging.with_name(f"replaced-{directory.name}")
        os.rename(directory, replaced)
    os.rename(staging, directory)
    flush(directory.parent)
    flush(directory.parent.parent)  # a run's first checkpoint: its directory is new itself
    shutil.rmtree(staging.parent, ignore_errors=True)


def recover(root: Path) -> list[Path]:
    """Clean up after a save that was killed: complete checkpoints in `STAGING` go to their places, the rest is
    removed, and what was on its way out.

    Returns:
        The checkpoints that were brought back.
    """
    staging, found = root / STAGING, list[Path]()
    for old in sorted(root.glob(f"{STAGING}.old*")):  # of clean-ups that were killed themselves
        found += _bring_back(old, root)
    if staging.is_dir():
        # On NFS a file that somebody has open cannot be removed, nor what it lies in: such a folder stays for now.
        names = (root / f"{STAGING}.old{number or ''}" for number in count())
        old = next(path for path in names if not path.exists())
        os.rename(staging, old)  # out of reach of a writer of the killed run, which knows it by its name
        found += _bring_back(old, root)
    remove_aside(root)
    return found


def remove_aside(root: Path) -> None:
    """Remove what has been put aside below names that begin with `REMOVED`."""
    for removed in root.glob(f"{REMOVED}*"):
        shutil.rmtree(removed, ignore_errors=True)


def left_over_bytes(root: Path) -> int:
    """Bytes of the disk that `recover` would free there."""
    folders = [path for path in root.glob(f"{STAGING}*") if path.is_dir()]
    entries = [entry for folder in folders for entry in folder.iterdir() if not _returns(entry, root)]
    entries += root.glob(f"{REMOVED}*")
    files = (path.lstat() for entry in entries for path in (entry, *entry.rglob("*")))
    return sum(found.st_blocks * 512 for found in files)


def _place(entry: Path, root: Path) -> Path:
    return root / entry.name.removeprefix("replaced-")


def _returns(entry: Path, root: Path) -> bool:
    """Whether it is a complete checkpoint whose place is free."""
    return entry.is_dir() and not _place(entry, root).exists() and find_damage(entry) is None


def _bring_back(folder: Path, root: Path) -> list[Path]:
    found: list[Path] = []
    if not folder.is_dir():
        return found
    for entry in sorted(folder.iterdir(), key=lambda path: path.name.startswith("replaced-")):
        if _returns(entry, root):
            os.rename(entry, _place(entry, root))
            found.append(_place(entry, root))
    flush(root)
    shutil.rmtree(folder, ignore_errors=True)
    return found
