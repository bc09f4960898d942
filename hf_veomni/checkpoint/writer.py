"""The process that writes checkpoints beside training: one a rank, told what to do line by line.

    trainer, rank r      copies its parts into memory that both see, sends a job, trains on
    writer, rank r       writes and flushes its files, then a note with their checksums
    writer, rank 0       waits for all notes, writes the manifest, renames the checkpoint into its place
    writer, rank r       answers the trainer, which reads it at the next step

It imports the standard library and the manifest alone: it starts at once, needs few megabytes and no device. It ends
with the trainer that started it, whatever ends that one.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import mmap
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_veomni.checkpoint.manifest import Digest, flush, publish, write_manifest

_PIECE = 1 << 24  # bytes hashed and written at a time
_PR_SET_PDEATHSIG = 1


def note_path(staging: Path, rank: int) -> Path:
    """Where a rank's writer says what it has written."""
    return staging.with_name(f"{staging.name}.ranks") / f"{rank:05d}.json"


def write_note(staging: Path, rank: int, note: dict[str, Any]) -> None:
    """Say it in one go: a note is whole or not there."""
    path = note_path(staging, rank)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(note))
    os.replace(part, path)


def write_file(path: Path, header: bytes, data: memoryview) -> Digest:
    """Write and flush one file. Returns its bytes and checksum."""
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for begin in range(0, len(data), _PIECE):
            piece = data[begin : begin + _PIECE]
            file.write(piece)
            digest.update(piece)
    flush(path)
    return len(header) + len(data), digest.hexdigest()


def _gather_notes(staging: Path, world: int, limit: float) -> dict[str, Digest]:
    """What all ranks have written, by path in the checkpoint."""
    found: dict[str, Digest] = {}
    missing, end = list(range(world)), time.monotonic() + limit
    while missing:
        for rank in list(missing):
            if not note_path(staging, rank).exists():
                continue
            note = json.loads(note_path(staging, rank).read_text())
            if "error" in note:
                raise RuntimeError(f"rank {rank} could not write its part: {note['error']}")
            found.update({name: (size, digest) for name, (size, digest) in note["files"].items()})
            missing.remove(rank)
        if missing and time.monotonic() > end:
            raise TimeoutError(f"ranks {missing} have not written their parts within {limit:.0f} s")
        time.sleep(0.01 if missing else 0)
    return found


def run_job(job: dict[str, Any], memory: memoryview) -> None:
    """Write this rank's files; on rank 0 then publish the checkpoint, when all ranks are there.

    Args:
        job: what `BackgroundWriter.start` sends.
        memory: the trainer's copy of the tensors.

    Raises:
        OSError: no space, or a directory that is gone.
        RuntimeError: another rank failed.
    """
    staging, rank = Path(job["staging"]), job["rank"]
    try:
        files = {}
        for file in job["files"]:
            header, (begin, end) = base64.b64decode(file["header"]), file["range"]
            files[file["name"]] = write_file(staging / file["name"], header, memory[begin:end])
    except OSError as error:
        for file in job["files"]:  # on a full disk there is no room for the note otherwise
            (staging / file["name"]).unlink(missing_ok=True)
        with suppress(OSError):  # without it, the trainers tell each other
            write_note(staging, rank, {"error": f"{type(error).__name__}: {error}"})
        raise
    write_note(staging, rank, {"files": files})
    if rank == 0:
        known = _gather_notes(staging, job["world"], job["limit"])
        write_manifest(staging, known)
        publish(staging, Path(job["target"]))


def serve(descriptor: int, parent: int) -> None:
    """Do jobs from standard input until it closes or says so; answer each with a line on standard output."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it ended before the line above
    os.nice(5)  # training goes first
    for line in sys.stdin:
        job = json.loads(line)
        if not job:
            return
        answer: dict[str, Any] = {}
        try:
            # Not closed: an error's frames still hold parts of it. It goes with the next job.
            size = job["memory"]
            shared = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) if size else b""
            run_job(job, memoryview(shared))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "errno": getattr(error, "errno", None)}
        print(json.dumps(answer), flush=True)
