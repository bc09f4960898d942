"""What every benchmark writes: json with commit, date, versions, hardware and plan beside the measured rows."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "peft", "numpy", "pyarrow")


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile, four significant digits."""
    p20, p50, p80 = np.percentile(values, [20, 50, 80])
    return {"p20": float(f"{p20:.4g}"), "p50": float(f"{p50:.4g}"), "p80": float(f"{p80:.4g}")}


def measure(function: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each of `repeats` calls, after one that is not counted."""
    function()
    seconds = []
    for _ in range(repeats):
        begin = clock()
        function()
        seconds.append(clock() - begin)
    return seconds


def environment(plan: Any = None) -> dict[str, Any]:
    """What stands beside the measured rows: commit, date, versions, hardware and plan."""
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
        "hardware": _hardware(),
        "plan": None if plan is None else str(plan),
    }


def record(name: str, rows: Sequence[Mapping[str, Any]], plan: Any = None) -> Path:
    """Write `benchmarks/results/<name>_<device>.json` and print where.

    Args:
        name: the benchmark.
        rows: one mapping a measured row.
        plan: the ParallelPlan it ran under, if any.
    """
    device = torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"
    path = RESULTS / f"{name}_{device}.json"
    content = {"benchmark": name, **environment(plan), "rows": list(rows)}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def known_rows(name: str) -> list[dict[str, Any]]:
    """Rows of the result on a CPU as it is, for a run that measures a part of them again."""
    path = RESULTS / f"{name}_cpu.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _commit() -> str | None:
    """The commit, with "+" if tracked files of the package differ from it; None outside of a git checkout."""
    root = Path(__file__).parent.parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "--", "hf_veomni") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    hardware = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
    }
    if torch.cuda.is_available():
        hardware |= {
            "gpu": torch.cuda.get_device_name(),
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    return hardware
