"""Which device a rank takes, with torch's answers about devices and groups replaced; and how its process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState

from hf_veomni import mesh

Choose = Callable[..., torch.device]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """`choose(backends, ...)`: the device of a rank in a group with these backends on a machine with accelerators."""

    def choose(
        backends: str,
        kind: str | None = "cuda",
        count: int = 8,
        current: int = 0,
        rank: int = 0,
        local_rank: int | None = None,
        bound: int | None = None,
        accelerate: str | None = None,
        use_cpu: bool = False,
    ) -> torch.device:
        accelerator = None if kind is None else torch.device(kind)
        index = [current]
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *a, **k: accelerator)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: index[0])
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: index.__setitem__(0, device))
        bound_device = None if bound is None or kind is None else torch.device(kind, bound)
        monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=SimpleNamespace(bound_device_id=bound_device)))
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_backend", lambda *a: "undefined")
        monkeypatch.setattr(dist, "get_backend_config", lambda *a: backends)
        monkeypatch.setattr(dist, "get_rank", lambda *a: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda *a: 8)
        state: dict[str, Any] = {} if accelerate is None else {"device": torch.device(accelerate)}
        monkeypatch.setattr(PartialState, "_shared_state", state)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(use_cpu).lower())
        device, world_size = mesh._start()
        assert world_size == 8
        if device.type != "cpu" and accelerate is None:
            assert index[0] == device.index, "the current device is another one"
        return device

    return choose


def test_a_group_without_a_named_backend_is_on_the_accelerator(choose: Choose) -> None:
    assert choose("cuda:nccl", local_rank=3) == torch.device("cuda", 3)


@pytest.mark.parametrize(("kind", "backends"), [("xpu", "xpu:xccl"), ("npu", "npu:hccl"), ("cuda", "cuda:nccl")])
def test_any_accelerator(choose: Choose, kind: str, backends: str) -> None:
    if kind == "npu":
        kind = "privateuseone"  # what torch calls those that it does not know
        backends = "privateuseone:hccl"
    assert choose(backends, kind=kind, local_rank=1) == torch.device(kind, 1)


def test_gloo_reaches_a_gpu_that_ranks_share(choose: Choose) -> None:
    assert choose("cpu:gloo,cuda:gloo", count=1, local_rank=1) == torch.device("cuda", 0)


def test_a_group_of_the_cpu_alone(choose: Choose) -> None:
    assert choose("cpu:gloo", local_rank=1) == torch.device("cpu")
    assert choose("cpu:gloo,cuda:gloo", kind="xpu", local_rank=1) == torch.device("cpu")
    assert choose("cpu:gloo,cuda:gloo", kind=None) == torch.device("cpu")


def test_accelerate_was_told_to_use_the_cpu(choose: Choose) -> None:
    assert choose("cpu:gloo,cuda:gloo", local_rank=1, use_cpu=True) == torch.device("cpu")
    assert choose("cpu:gloo,cuda:gloo", local_rank=1, accelerate="cpu") == torch.device("cpu")


def test_the_device_that_somebody_has_set_is_kept(choose: Choose) -> None:
    assert choose("cuda:nccl", current=5, local_rank=1) == torch.device("cuda", 5)
    assert choose("cuda:nccl", bound=0, local_rank=1) == torch.device("cuda", 0)
    assert choose("cuda:nccl", accelerate="cuda:2", local_rank=1) == torch.device("cuda", 2)


def test_accelerate_before_the_group_has_no_index(choose: Choose) -> None:
    assert choose("cuda:nccl", accelerate="cuda", local_rank=6) == torch.device("cuda", 6)


def test_without_a_launcher_the_rank_decides(choose: Choose) -> None:
    assert choose("cuda:nccl", rank=10) == torch.device("cuda", 2)


@pytest.mark.parametrize(
    ("line", "runs"),
    [
        ("7 (pt_gloo_runloop) R 1 7", True),
        ("7 (pt_gloo_runloop) D 1 7", True),
        ("7 (pt_gloo_runloop) S 1 7", False),
        ("7 (python) R 1 7", False),
        ("7 (odd) R (name) R 1 7", False),
    ],
)
def test_threads_of_gloo_that_run(tmp_path: Path, line: str, runs: bool) -> None:
    (tmp_path / "stat").write_text(line)
    assert mesh._is_runnable(tmp_path / "stat") is runs
    assert not mesh._is_runnable(tmp_path / "gone")


def test_the_end_waits_for_threads_of_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([True, True, False, True, False, False])
    monkeypatch.setattr(Path, "glob", lambda *_: [Path("stat")])
    monkeypatch.setattr(mesh, "_is_runnable", lambda _: next(states))
    mesh.let_gloo_rest()
    assert next(states, None) is None
    monkeypatch.setattr(mesh, "_is_runnable", lambda _: True)
    begin = time.monotonic()
    mesh.let_gloo_rest(limit=0.05)
    assert time.monotonic() - begin < 5


# Two ranks whose threads get a core last, on a machine without an idle one; a group outlives `destroy_process_group`.
ENDS = """
import os, sys, time
import torch, torch.distributed as dist
from hf_veomni.mesh import init_parallel_state

def burn():
    while True: pass

burners = []
for _ in range(os.cpu_count()):
    if (pid := os.fork()) == 0: burn()
    burners.append(pid)
failed = 0
for turn in range(4):
    ranks = []
    for rank in range(2):
        if (pid := os.fork()) == 0: break
        ranks.append(pid)
    else:
        failed += sum(os.waitpid(pid, 0)[1] != 0 for pid in ranks)
        continue
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/{turn}", rank=rank, world_size=2)
    kept = init_parallel_state("sp=2")
    dist.barrier()
    for thread in os.listdir("/proc/self/task"):
        if open(f"/proc/self/task/{thread}/comm").read().strip() == "pt_gloo_runloop":
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    for _ in range(20):
        parts = [torch.ones(100), torch.ones(100)]
        dist.all_gather(parts, torch.ones(100))
        del parts
    sys.exit(0)
for pid in burners: os.kill(pid, 9)
sys.exit(failed)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the states of threads")
def test_a_process_ends_after_the_threads_of_gloo(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS, str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
