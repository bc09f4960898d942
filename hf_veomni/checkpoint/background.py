"""Checkpoints beside training, the trainer's side: a copy in host memory, and the process that writes it."""

from __future__ import annotations

import base64
import json
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_veomni.checkpoint import writer
from hf_veomni.checkpoint.lazy import LazyTensor
from hf_veomni.checkpoint.shards import Shard

_ALIGNMENT = 64
# The two packages without what they import: torch, and transformers.
_START = """
import sys, types
for name, path in zip(("hf_veomni", "hf_veomni.checkpoint"), sys.argv[1:3]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from hf_veomni.checkpoint.writer import serve
serve(int(sys.argv[3]), int(sys.argv[4]))
"""


def _cuda() -> Any:
    return torch.cuda.cudart()


class BackgroundError(OSError):
    """A checkpoint was not written beside training."""


class HostMemory:
    """Memory without a name that another process can read too; page-locked if this process trains on CUDA.

    It goes with the last process that has it open: nothing is left behind by a kill.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("hf_veomni-checkpoint")
        self.size = 0
        self._bytes: Tensor | None = None
        self._pinned = False

    def reserve(self, num_bytes: int) -> None:
        """Have at least so many bytes.

        Raises:
            OSError: there is not so much memory.
        """
        if num_bytes <= self.size:
            return
        self.release()
        os.posix_fallocate(self.descriptor, 0, num_bytes)
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, num_bytes, flags=flags), dtype=torch.uint8)
        self.size = num_bytes
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            status = _cuda().cudaHostRegister(self._bytes.data_ptr(), num_bytes, 0)
            if int(status) != 0:
                raise OSError(f"{num_bytes} bytes of host memory cannot be page-locked for `async_save` ({status}).")
            self._pinned = True

    def release(self) -> None:
        """Give the memory back; `reserve` takes some again."""
        if self._pinned and self._bytes is not None:
            _cuda().cudaHostUnregister(self._bytes.data_ptr())
        self._bytes, self._pinned, self.size = None, False, 0

    def close(self) -> None:
        """Give it back for good."""
        self.release()
        os.close(self.descriptor)

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor], begin: int) -> int:
        """Copy tensors behind each other, from `begin` on. Returns where they end. See `wait`."""
        assert self._bytes is not None or not tensors
        for tensor in tensors:
            assert self._bytes is not None
            end = begin + tensor.nbytes
            values = tensor.read() if isinstance(tensor, LazyTensor) else tensor
            self._bytes[begin:end].view(tensor.dtype).view(tensor.shape).copy_(values, non_blocking=self._pinned)
            begin = end
        return begin

    def wait(self) -> None:
        """Until all copies are done, so that the tensors may change."""
        if self._pinned:
            torch.cuda.current_stream().synchronize()


class BackgroundWriter:
    """Writes one checkpoint at a time beside training. Errors are returned by `poll` and `wait`, not raised.

    Args:
        limit: seconds that rank 0's process waits for the files of the others.
    """

    def __init__(self, limit: float = 1800.0) -> None:
        self._limit = limit
        self._memory = HostMemory()
        self._process: subprocess.Popen[bytes] | None = None
        self._job: dict[str, Any] | None = None
        self._answer = b""

    @property
    def pid(self) -> int | None:
        """Of the process that writes, if it runs."""
        return None if self._process is None else self._process.pid

    def start(self, shards: Sequence[Shard], staging: Path, target: Path, rank: int, world: int) -> None:
        """Copy this rank's parts and return; the rest goes on beside training. `wait` for the last one before.

        Args:
            shards: this rank's files, below `staging`.
            staging: where the checkpoint is written; rank 0's writer moves it to `target`.

        Raises:
            OSError: no memory for the copy, or the process does not start.
        """
        assert self._job is None, "the last save is under way, and its copy is not to be overwritten"
        begins, end = [], 0
        for shard in shards:
            begins.append(end + -end % _ALIGNMENT)
            end = begins[-1] + shard.num_bytes
        self._memory.reserve(end)
        files = []
        for shard, begin in zip(shards, begins, strict=True):
            stop = self._memory.copy(shard.tensors, begin)
            name = shard.path.relative_to(staging).as_posix()
            header = base64.b64encode(shard.header).decode()
            files.append({"name": name, "header": header, "range": [begin, stop]})
        self._memory.wait()
        job = {"files": files, "staging": str(staging.absolute()), "target": str(target.absolute())}
        self._send({**job, "rank": rank, "world": world, "memory": self._memory.size, "limit": self._limit})

    def _send(self, job: dict[str, Any]) -> None:
        if self._process is None or self._process.poll() is not None:
            # Inherited by the process: a scheduler's signals are for the trainer, which saves first.
            mask = signal.pthread_sigmask(
                signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
            )
            try:
                self._process = self._open()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        self._job, self._answer = job, b""

    def _open(self) -> subprocess.Popen[bytes]:
        folder, descriptor = Path(__file__).parent, self._memory.descriptor
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, *map(str, (folder.parent, folder, descriptor, os.getpid()))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(descriptor,),
            start_new_session=True,  # Ctrl-C is for the trainer
        )

    def poll(self) -> Exception | None:
        """What went wrong since `start`, if anything did so far. Does not wait. `busy` tells whether it is done."""
        return self._receive(0.0)

    def wait(self, seconds: float | None = None) -> Exception | None:
        """The same when the save is done, or after so many seconds."""
        return self._receive(seconds)

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._job is not None

    def _receive(self, seconds: float | None) -> Exception | None:
        if self._job is None or self._process is None or self._process.stdout is None:
            return None
        stream = self._process.stdout
        while not self._answer.endswith(b"\n"):
            if not select.select([stream], [], [], seconds)[0]:
                return None
            piece = os.read(stream.fileno(), 1 << 16)
            if not piece:
                return self._ended()
            self._answer += piece
        job, self._job = self._job, None
        answer = json.loads(self._answer)
        if not answer:
            return None
        return BackgroundError(f"Saving '{job['target']}' beside training failed: {answer['error']}")

    def _ended(self) -> Exception:
        assert self._process is not None and self._job is not None
        code, job = self._process.wait(), self._job
        self._process, self._job = None, None
        why = f"the process that writes ended with exit code {code}"
        try:
            writer.write_note(Path(job["staging"]), job["rank"], {"error": why})  # rank 0's waits for it
        except OSError:
            pass  # the checkpoint is in its place, or gone
        return BackgroundError(f"Saving '{job['target']}' beside training failed: {why}; out of memory, or killed.")

    def cancel(self) -> None:
        """Give the save up, if one is under way. The next one starts a process of its own."""
        process, self._job = self._process if self.busy else None, None
        if process is not None:
            process.kill()
            process.communicate()  # closes what leads to it
            self._process = None

    def close(self, seconds: float) -> None:
        """End the process; a save under way gets so many seconds. It cannot be used any more."""
        self.wait(seconds)
        process, self._process = self._process, None
        if process is not None:
            if self.busy:
                process.kill()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(b"{}\n")
                process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended
            process.wait()
            process.stdout.close()
        self._job = None
        self._memory.close()
