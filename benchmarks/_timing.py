"""How long something takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: between two CUDA events, from an idle device on; on the CPU, CPU time of this process."""
    if device.type == "cpu":
        begin = time.process_time()
        function()
        return time.process_time() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 10) -> float:
    """FLOP/s of a large matmul on random numbers, the best of `repeats`: what this device reaches."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(repeats))
