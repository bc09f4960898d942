"""Parts that go wrong in all ways, for the runner of `benchmarks/on_gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch

from benchmarks.on_gpu.part import NOTE, Part

LEFT_BEHIND = "import time; time.sleep(297.125)"


def run(part: Part) -> None:
    part.case("before", good, part)
    part.case("bad", globals()[part.name], part, seconds=2.0 if part.name == "hang" else 30.0)
    part.case("after", good, part)


def good(part: Part) -> None:
    print("this is the output of", part.name)
    part.check(True, "fine", value=1.5)


def wrong(part: Part) -> None:
    part.check(False, "off by 3")


def error(part: Part) -> None:
    part.row(NOTE, "a row before it")
    raise RuntimeError("nothing works\nat all")


def memory(part: Part) -> None:
    raise torch.OutOfMemoryError("full")


def crash(part: Part) -> None:
    os.abort()


def hang(part: Part) -> None:
    subprocess.Popen([sys.executable, "-c", LEFT_BEHIND])
    time.sleep(300)


def slow(part: Part) -> None:
    time.sleep(300)
