"""How the files of a checkpoint come to the disk: at once, or beside training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hf_veomni.checkpoint import BackgroundWriter, agree, together
from hf_veomni.checkpoint.manifest import Digest, publish, write_manifest
from hf_veomni.checkpoint.shards import INDEX, Shard, plan_state, write_shard
from hf_veomni.checkpoint.writer import note_path
from hf_veomni.trainer.store import Board

_GRACE = 10.0  # seconds that a save under way gets when training ends in an error: a rank may be dead
_SLICE = 0.5  # seconds between two looks at whether another rank failed


class CheckpointSaver:
    """Takes the sharded states of one checkpoint after the other and publishes it, with what lies beside them.

    Args:
        beside: publish beside training: it stops for a copy of this rank's shards in host memory.
        limit: seconds that rank 0's process then waits for the files of the others, one of which may be dead.

    Every method but `poll` and `close` is collective; an error on one rank is raised on all of them.
    """

    def __init__(self, beside: bool, limit: float = 1800.0) -> None:
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._writer = BackgroundWriter(limit) if beside else None
        self._shards: list[Shard] = []
        self._target: Path | None = None  # of the save beside training
        self._error: Exception | None = None

    def begin(self) -> None:
        """Forget what an earlier save that failed has left."""
        self._shards = []

    def add(self, state: Mapping[str, Any], directory: Path, leads: bool) -> None:
        """Plan the files of a sharded state in a new directory of the checkpoint. `publish` reads its tensors.

        Args:
            leads: whether this rank writes what is no shard (`writes_whole`).
        """
        with together(f"Writing '{directory}'"):
            shard, index = plan_state(state, directory, leads)
            if self._rank == 0:
                directory.mkdir(parents=True)
                (directory / INDEX).write_text(index)
        self._shards.append(shard)

    def publish(self, staging: Path, target: Path) -> None:
        """Write the planned files and the manifest, and move the checkpoint into its place; or begin to.

        Raises:
            OSError: a rank cannot write, or has no memory for the copy.
        """
        shards, self._shards = self._shards, []
        if self._writer is not None:
            with together(f"Saving '{target}'"):
                if self._rank == 0:
                    note_path(staging, 0).parent.mkdir()
            with together(f"Saving '{target}'"):
                self._writer.start(shards, staging, target, self._rank, self._world)
            self._target = target
            return
        known: dict[str, Digest] = {}
        with together(f"Saving '{target}'"):
            known = {shard.path.relative_to(staging).as_posix(): write_shard(shard) for shard in shards}
        everyone: list[Any] = [known]
        if self._world > 1:
            everyone = [None] * self._world
            dist.all_gather_object(everyone, known)
        with together(f"Saving '{target}'"):
            if self._rank == 0:
                write_manifest(staging, {name: digest for files in everyone for name, digest in files.items()})
                publish(staging, target)

    def poll(self) -> Exception | None:
        """What went wrong beside training on this rank, if anything did. Does not wait."""
        if self._writer is not None and self._error is None:
            self._error = self._writer.poll()
        return self._error

    def finish(self) -> Path | None:
        """Wait for the save beside training. Returns the checkpoint that is in its place now, if there was one.

        Raises:
            OSError: it failed on some rank.
        """
        target, self._target = self._target, None
        if target is None or self._writer is None:
            return None
        error = self._wait(self._writer)
        try:
            agree(error, f"Saving '{target}' beside training")
        except Exception:
            self._writer.cancel()
            raise
        return target

    def _wait(self, writer: BackgroundWriter) -> Exception | None:
        """Until it is done, or a rank says that its part failed: rank 0's writer may never hear of it, for the note
        is a file, and the disk is full."""
        if self._world == 1:
            return self._error or writer.wait()
        board = Board("saving")
        while True:
            error = self._error or writer.wait(_SLICE)
            if error is not None:
                board.post("failed", self._rank)
            if error is not None or not writer.busy or board.read("failed") is not None:
                return error

    def close(self) -> None:
        """End the process beside this one; a save under way gets `_GRACE` seconds."""
        if self._writer is not None:
            self._writer.close(_GRACE)
