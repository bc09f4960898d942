"""Tests of what may not be written, also where they run as root."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_CAP_DAC_OVERRIDE = 1 << 1
_CAPABILITIES_V3 = 0x20080522


def override_permissions(wanted: bool) -> None:
    """Whether root may write where the permissions of a folder say that nobody may. Of others it never is so."""
    if os.geteuid() != 0:
        return
    libc, header, data = (
        ctypes.CDLL(None, use_errno=True),
        (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0),
        (ctypes.c_uint32 * 6)(),
    )
    assert libc.capget(header, data) == 0
    data[0] = data[0] | _CAP_DAC_OVERRIDE if wanted else data[0] & ~_CAP_DAC_OVERRIDE
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


@contextmanager
def permissions_count() -> Iterator[None]:
    """As for any user."""
    override_permissions(False)
    try:
        yield
    finally:
        override_permissions(True)
