"""Two machines: network namespaces with nothing in common but a virtual link, and `accelerate launch` in each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from tests.e2e.launching import ROOT
from tests.e2e.two_machines import PLAN, Experts
from tests.ranks.training import Outcome, assert_same_training, train_stock

ADDRESSES = ("10.231.77.1", "10.231.77.2")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Machines:
    """Names of the two namespaces, and of each one's end of the link."""

    names: tuple[str, str]
    ends: tuple[str, str]

    def connect(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", self.ends[0], "netns", self.names[0], "type", "veth",
            "peer", "name", self.ends[1], "netns", self.names[1])  # fmt: skip
        for name, end, address in zip(self.names, self.ends, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")

    def cut(self) -> None:
        _ip("-n", self.names[0], "link", "set", self.ends[0], "down")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def launch(self, machine: int, folder: Path, *arguments: str) -> subprocess.Popen[str]:
        """The launcher of one machine; its output goes to `output<machine>` in `folder`."""
        config = folder / "two.yaml"
        config.write_text(yaml.safe_dump({
            "distributed_type": "FSDP", "use_cpu": True, "gpu_ids": "-1", "mixed_precision": "no",
            "num_machines": 2, "num_processes": 4, "same_network": True,
            "fsdp_config": {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": False},
            "parallelism_config": {"parallelism_config_sp_backend": f"veomni:{PLAN}"},
        }))  # fmt: skip
        script = str(ROOT / "tests/e2e/two_machines.py")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment["GLOO_SOCKET_IFNAME"] = self.ends[machine]
        command = ["ip", "netns", "exec", self.names[machine], sys.executable, "-m", "accelerate.commands.launch",
                   "--config_file", str(config), "--machine_rank", str(machine), "--main_process_ip", ADDRESSES[0],
                   "--main_process_port", "29511", script, *arguments]  # fmt: skip
        with (folder / f"output{machine}").open("w") as output:
            return subprocess.Popen(
                command, env=environment, text=True, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )


@pytest.fixture
def machines() -> Iterator[Machines]:
    if shutil.which("ip") is None:
        pytest.skip("`ip` of iproute2 makes the namespaces, and is not installed")
    tag = str(os.getpid())
    found = Machines((f"omni-a-{tag}", f"omni-b-{tag}"), ("omni-a", "omni-b"))
    try:
        found.connect()
    except OSError as error:
        found.remove()
        pytest.skip(f"no network namespaces for this user ({error})")
    yield found
    found.remove()


def _end(launchers: list[subprocess.Popen[str]], folder: Path, limit: float) -> list[str]:
    """What the launchers have said when both have ended."""
    end, late = time.monotonic() + limit, []
    for number, launcher in enumerate(launchers):
        try:
            launcher.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(number)
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    texts = [(folder / f"output{number}").read_text() for number in range(2)]
    assert not late, f"machines {late} not done after {limit} s:\n" + "\n=====\n".join(text[-3000:] for text in texts)
    return texts


@pytest.mark.slow
def test_two_machines_train_like_one_process(machines: Machines, tmp_path: Path) -> None:
    result = tmp_path / "result.pt"
    launchers = [machines.launch(number, tmp_path, str(result), "whole") for number in range(2)]
    texts = _end(launchers, tmp_path, 240)
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n=====\n".join(text[-3000:] for text in texts)
    found = Outcome(**torch.load(result, weights_only=True))
    assert_same_training(found, train_stock(Experts(), data_ranks=2))


@pytest.mark.slow
def test_a_cut_link_is_reported_on_both_sides(machines: Machines, tmp_path: Path) -> None:
    launchers = [machines.launch(number, tmp_path, str(tmp_path / "none"), "slow") for number in range(2)]
    output, end = tmp_path / "output0", time.monotonic() + 180
    while "step 4" not in output.read_text():
        assert time.monotonic() < end and launchers[0].poll() is None, output.read_text()[-3000:]
        time.sleep(0.2)
    machines.cut()
    first, second = _end(launchers, tmp_path, 150)  # 60 s for the ranks, and what the launchers take
    assert all(launcher.returncode for launcher in launchers)
    assert "Nothing has been heard of ranks 2, 3" in first, first[-4000:]
    assert "The store of the process group has not answered" in second, second[-4000:]
