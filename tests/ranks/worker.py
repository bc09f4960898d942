"""One rank: waits for a case, runs it in a fresh process group, sends back its result or its traceback."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection


@dataclass(frozen=True)
class Case:
    """What all ranks run: a function of a module by name, since ranks import the test module themselves."""

    module: str
    function: str
    arguments: bytes
    rendezvous: str
    timeout: float
    sys_path: list[str]


@dataclass(frozen=True)
class Reply:
    """What one rank answers. `value` is pickled; `kinds` are the names of the exception's class and of
    those it inherits from, none if it returned."""

    value: bytes = b""
    kinds: tuple[str, ...] = ()
    message: str = ""
    traceback: str = ""


def serve(rank: int, world_size: int, pipe: Connection, log: str, stacks: str) -> None:
    """The loop of one rank; returns when the other end of the pipe closes."""
    _redirect_output(log)
    faulthandler.enable()  # a crash in native code writes where Python stood into the log, which the report shows
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"), all_threads=True)  # noqa: SIM115
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), ACCELERATE_USE_CPU="true")
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported so far stays: else each collection between cases walks all of it
    pipe.send_bytes(b"ready")
    while True:
        try:
            case: Case = pickle.loads(pipe.recv_bytes())
            # A context of its own, so that no ContextVar outlives the case.
            copy_context().run(_answer, case, rank, world_size, pipe)
        except EOFError:
            return


def _redirect_output(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _answer(case: Case, rank: int, world_size: int, pipe: Connection) -> None:
    with _fresh_state(case, rank, world_size):
        pipe.send_bytes(pickle.dumps(_run(case)))
        # Groups stay until every rank has answered, else a rank that raises would make the others fail as well.
        pipe.recv_bytes()


def _run(case: Case) -> Reply:
    try:
        function = getattr(importlib.import_module(case.module), case.function)
        args, kwargs = pickle.loads(case.arguments)
        return Reply(value=pickle.dumps(function(*args, **kwargs)))
    except BaseException as error:  # a rank that stops answering would look like a hang
        kinds = tuple(owner.__name__ for owner in type(error).__mro__)
        return Reply(kinds=kinds, message=str(error), traceback=traceback.format_exc())


@contextmanager
def _fresh_state(case: Case, rank: int, world_size: int) -> Iterator[None]:
    """A world of its own for each case: process groups, seeds, environment and defaults do not pass to the next."""
    import numpy
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState

    environment = dict(os.environ)
    sys.path[:0] = [path for path in case.sys_path if path not in sys.path]
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{case.rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=case.timeout),
    )
    dist.barrier()  # a rank is ready before the others are
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_meshes()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(environment)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        gc.collect()


def _forget_meshes() -> None:
    """Empty torch's caches of DTensor layouts, which outlive process groups.

    Meshes compare equal by shape and names, so the next world would be served with the groups of the last one: "Could
    not resolve the process group", or an all-gather over too few ranks (torch 2.13, HSDP meshes).
    """
    from torch.distributed.tensor import _redistribute
    from torch.distributed.tensor.debug import _clear_fast_path_sharding_prop_cache, _clear_python_sharding_prop_cache

    _redistribute._gen_transform_infos.cache_clear()
    _redistribute.clear_redistribute_planner_cache()
    _clear_fast_path_sharding_prop_cache()
    _clear_python_sharding_prop_cache()
