"""Random streams: data order is the same on all ranks of an SP group, dropout is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_stream(device: torch.device, *key: int) -> Iterator[None]:
    """Draw torch's random numbers from a stream that `key` names, and leave the process-wide generators as they were.

    The ranks of an SP group hold different tokens of a row, so their dropout masks must differ; their samplers and
    collators must not. A stream that is a function of (seed, step, micro-batch, rank) gives both, and a resumed run
    draws the same masks without any stored state.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(int.from_bytes(digest, "big"))
        yield
