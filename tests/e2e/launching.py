"""Runs the public commands as a user does, with a time limit on the whole process group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 180


def run(*command: str, cwd: Path = ROOT, check: bool = True, limit: float = LIMIT) -> tuple[int, str]:
    """Exit status and output (both streams) of a command; kills it and all it started after `limit` seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    if cwd != ROOT:
        environment["HF_DATASETS_CACHE"] = str(cwd / "datasets-cache")
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {limit} s: {' '.join(command)}\n{output[-4000:]}") from None
    if check and process.returncode:
        raise AssertionError(f"exit status {process.returncode}: {' '.join(command)}\n{output[-6000:]}")
    return process.returncode, output


def launch(config: str, script: str, *arguments: str, **options) -> tuple[int, str]:
    """`accelerate launch` with a file of accelerate_configs/, on a free port."""
    path = ROOT / "accelerate_configs" / config
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return run(*command, "--main_process_port", "0", script, *arguments, **options)


def python(script: str, *arguments: str, **options) -> tuple[int, str]:
    """The same script in one process, without a launcher."""
    return run(sys.executable, script, *arguments, **options)
