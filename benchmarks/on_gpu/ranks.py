"""Two ranks that share the device, over gloo, since NCCL takes no two ranks of one device: parity as with one rank."""

from __future__ import annotations

import os
import signal
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.on_gpu.compare import Errors, Found, _mesh_on_host, compare, limits_of, run_prepared, yardstick
from benchmarks.on_gpu.families import build, inputs_of
from benchmarks.on_gpu.parity import reference
from benchmarks.on_gpu.part import (
    FAILED,
    PATIENCE,
    Part,
    compute_exactly,
    leave,
    show_stacks_when_asked,
    start_context,
)

RANKS = 2
# An SP group reads the same row, so that the errors are those of one row.
CASES = (
    ("dense", "sp=2", torch.float32),
    ("moe", "sp=2,ep=2", torch.float32),
    ("moe", "sp=2,ep=2", torch.bfloat16),
    ("linear", "sp=2", torch.float32),
    ("vlm", "sp=2", torch.float32),
    ("window", "sp=2", torch.bfloat16),
    ("sinks", "sp=2,ep=2", torch.float32),
    ("softcap", "sp=2", torch.float32),
)
FEW = (CASES[0], CASES[1])
CASE_SECONDS, START_SECONDS, GRACE_SECONDS = 75.0, 90.0, 5.0


@dataclass(frozen=True)
class Task:
    """What the ranks are to compute, and the folder where the reference lies."""

    family: str
    plan: str
    dtype: torch.dtype
    small: bool
    device: str
    folder: str


def run(part: Part) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(part.device)
        for family, plan, dtype in FEW if part.small else CASES:
            task = Task(family, plan, dtype, part.small, part.device, folder)
            name = f"{family} {plan} {str(dtype).removeprefix('torch.')}"
            part.case(name, two_ranks, part, ranks, task, seconds=CASE_SECONDS + START_SECONDS)
        ranks.close()


def two_ranks(part: Part, ranks: Ranks, task: Task) -> None:
    """Reference and limits in this process, then the ranks."""
    path = Path(task.folder, task.family)
    wanted = reference(task.family, task.small) if not path.exists() else torch.load(path, weights_only=False)
    torch.save(wanted, path)
    model = build(task.family, task.small, task.dtype, task.device)
    documents, row = inputs_of(task.family, task.small, model)
    stock = yardstick(task.family, model, documents, row, task.device, wanted)
    del model
    limits = limits_of(stock, task.dtype)
    for rank, reply in enumerate(ranks.run(task)):
        if isinstance(reply, str):
            part.row(FAILED, f"rank {rank}: {reply}")
        elif rank == 0 or not reply.within(limits):
            summary = f"rank {rank}: {reply} (stock {stock.numbers()}) {reply.parameter}"
            part.check(reply.within(limits), summary, errors=asdict(reply), stock=asdict(stock), limits=asdict(limits))


class Ranks:
    """Processes that compute one task after the other; new ones are started after one has failed."""

    def __init__(self, device: str) -> None:
        self._context = start_context(device)
        self._patience = PATIENCE[device]
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, task: Task) -> list[Errors | str]:
        """What each rank found, or how it failed."""
        limit = CASE_SECONDS * self._patience
        if not self._processes:
            self._start()
            limit += START_SECONDS * self._patience
        with tempfile.NamedTemporaryFile(prefix="store") as store:
            for pipe in self._pipes:
                pipe.send((task, store.name + ".ranks"))
            replies = self._collect(limit)
        if any(isinstance(reply, str) for reply in replies):
            self.close()
        return replies

    def _start(self) -> None:
        for rank in range(RANKS):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve_rank, args=(rank, theirs), name=f"rank{rank}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, limit: float) -> list[Errors | str]:
        """The answer of each rank; once one has failed the others have a moment left."""
        waiting, end = {pipe: rank for rank, pipe in enumerate(self._pipes)}, time.monotonic() + limit
        replies: list[Errors | str] = ["gave no answer in time: the log has its stacks"] * RANKS
        while waiting and (left := end - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    replies[rank] = pipe.recv()
                except EOFError:
                    self._processes[rank].join(1.0)
                    replies[rank] = f"died with exit status {self._processes[rank].exitcode}"
                if isinstance(replies[rank], str):
                    end = min(end, time.monotonic() + GRACE_SECONDS)
        for rank in waiting.values():
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5 if waiting else 0.0)  # for the stacks to be written
        return replies

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []


def serve_rank(rank: int, pipe: Connection) -> None:
    """The process of one rank."""
    show_stacks_when_asked()
    compute_exactly()
    torch.set_num_threads(2 if torch.cuda.is_available() else 1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(RANKS)}
    while True:
        try:
            task, store = pipe.recv()
        except EOFError:
            leave(0)
        try:
            pipe.send(compute(rank, task, store))
        except BaseException as error:
            traceback.print_exc()
            pipe.send(f"{type(error).__name__}: {str(error).strip()[:300]}")
            leave(1)


def compute(rank: int, task: Task, store: str) -> Errors:
    """This rank's errors. Collective."""
    from hf_veomni import prepare_omni

    if task.device == "cuda":
        torch.cuda.set_device(0)
    _mesh_on_host.cache_clear()  # of another group
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    wanted: Found = torch.load(Path(task.folder, task.family), weights_only=False)
    model = build(task.family, task.small, task.dtype, task.device)
    row = inputs_of(task.family, task.small, model)[1]
    model = prepare_omni(model, task.plan)
    at = next(model.parameters()).device.type
    if at != task.device:
        raise ValueError(f"the parameters are on {at}, not on {task.device}")
    if task.device == "cuda":
        sum_and_divide(model)
    errors = compare(run_prepared(model, row, task.device), wanted)
    dist.barrier()
    dist.destroy_process_group()
    return errors


def sum_and_divide(model: Any) -> None:
    """Have FSDP divide by itself: gloo may have no average for CUDA tensors. The same numbers."""
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
