"""Ranks in processes of their own, which may die: for what ends a process. See `ranks` for all else."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """How a rank ended. `code` is negative for a signal, None if it had to be killed at the limit; `seconds` is when,
    from the start of all."""

    code: int | None
    seconds: float
    output: str


def run_alone(function: Callable[..., Any], world: int, folder: Path, *args: Any, limit: float = 90.0) -> list[Ended]:
    """`function(rank, *args)` on each rank of a new world on gloo, in rank order.

    Args:
        function: at the top level of a module.
        folder: for their output.
        limit: seconds, after which the rest is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks.preload", "hf_veomni.trainer"])
    rendezvous = folder / f"rendezvous{time.monotonic_ns()}"
    outputs = [folder / f"{rendezvous.name}-output{rank}" for rank in range(world)]
    begin = time.monotonic()
    ranks = [
        context.Process(target=_run, args=(rank, world, rendezvous, outputs[rank], function, args), daemon=False)
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    ended: dict[int, Ended] = {}
    while len(ended) < world:
        late = time.monotonic() - begin > limit
        for number, rank in enumerate(ranks):
            if number not in ended and (late or not rank.is_alive()):
                code = None if rank.is_alive() else rank.exitcode
                rank.kill()
                rank.join()
                ended[number] = Ended(code, time.monotonic() - begin, outputs[number].read_text(errors="replace"))
        time.sleep(0.05)
    return [ended[rank] for rank in range(world)]


def _run(
    rank: int, world: int, rendezvous: Path, output: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    method = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=timedelta(seconds=1800))
    torch.manual_seed(0)
    function(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for threads of groups
