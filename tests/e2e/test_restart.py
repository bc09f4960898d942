"""`examples/restart.py` in processes of its own: signals from outside, and torchrun that starts it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_veomni.checkpoint.convert import convert
from tests.e2e.launching import ROOT, run

STEPS = 6

# `restart.py` with a callback by which rank 1 is killed in its first start, or a step takes its time.
SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {examples!r})
import restart
from transformers import TrainerCallback

class Disturb(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and "--killed" in os.environ.get("DISTURB", "")
        if first and os.environ["RANK"] == "1" and state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if "--slow" in os.environ.get("DISTURB", ""):
            time.sleep(1)

if __name__ == "__main__":
    restart.main([Disturb()])
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "disturbed.py"
    path.write_text(SCRIPT.format(examples=str(ROOT / "examples")))
    return path


def _options(checkpoint: Path, output: Path) -> list[str]:
    given = {"model": checkpoint, "output_dir": output, "max_tokens": 128, "max_steps": STEPS, "save_steps": 2}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def _torchrun(script: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    return run(*command, str(script), *arguments, check=False, limit=240)


@pytest.mark.slow
def test_torchrun_starts_again_from_the_newest_checkpoint(
    script: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    status, text = _torchrun(script, *_options(tiny_checkpoint, tmp_path / "calm"))
    assert status == 0, text[-3000:]
    monkeypatch.setenv("DISTURB", "--killed")
    saved = ["--async_save", "False"]  # else the first checkpoint may still be under way when the rank is killed
    status, text = _torchrun(script, *_options(tiny_checkpoint, tmp_path / "killed"), *saved)
    assert status == 0, text[-3000:]
    assert text.count("step 1\n") == 2, "started from the beginning"
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "calm"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_signal_to_the_whole_group_saves_and_ends_with_its_code(
    script: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Workers of the loader included, as Slurm does it."""
    options = [*_options(tiny_checkpoint, tmp_path / "run"), "--dataloader_num_workers", "1", "--save_steps", "100"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"DISTURB": "--slow", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        [sys.executable, str(script), *options],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        while (line := process.stdout.readline()) and "step 2" not in line:
            pass
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, output[-3000:]
    saved = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert len(saved) == 1 and saved[0] in ("checkpoint-2", "checkpoint-3"), (saved, output[-2000:])
    convert(tmp_path / "run" / saved[0], tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors")
