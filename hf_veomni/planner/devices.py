"""Devices that plans are made for: a table of real ones, and yaml files of others."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from math import inf
from pathlib import Path

from hf_veomni.errors import UnsupportedError
from hf_veomni.plan import nearest
from hf_veomni.yaml_files import read_mapping

_TABLE = Path(__file__).with_name("devices.yaml")
_TEXTS = ("name", "source", "measured", "torch_name")
# Of the same name, and not what the table describes; torch has "A100-PCIE-40GB" beside "H100 PCIe".
_LESSER = re.compile(r"\b(MIG|Laptop|Ti|D|PCIe|NVL)\b", re.IGNORECASE)
_NEAR = 0.1  # of the memory


@dataclass(frozen=True)
class Device:
    """One device and the node that it stands in; units as at the top of devices.yaml."""

    name: str
    memory_gib: float
    peak_tflops: float
    matmul_tflops: float
    grouped_tflops: float
    attention_tflops: float
    whole_tflops: float
    memory_gbs: float
    node: int
    intra_gbs: float
    intra_us: float
    inter_gbs: float
    inter_us: float
    measured: tuple[str, ...] = ()
    source: str = ""
    torch_name: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _TEXTS:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < inf:
                raise ValueError(f"`{field.name}` ({value!r}) of device '{self.name}' must be a number above 0.")
        if not isinstance(self.node, int):
            raise ValueError(f"`node` ({self.node!r}) of device '{self.name}' must be a whole number of devices.")


@lru_cache
def known_devices() -> Mapping[str, Device]:
    """The table by short name."""
    values = read_mapping(_TABLE, "Table of devices", "h100-80gb: {...}")
    return {key: _device(key, entry) for key, entry in values.items()}


def find_device(device: str | os.PathLike[str] | Device) -> Device:
    """A device of the table by its short name, or that of a yaml file.

    Raises:
        ValueError: neither, or a file with keys missing, unknown or of the wrong kind.
    """
    if isinstance(device, Device):
        return device
    text = str(device)
    if text.endswith((".yaml", ".yml")):
        return _device(text, read_mapping(text, "Device file", "memory_gib: 80"))
    known = known_devices()
    if text.lower() not in known:
        raise ValueError(
            f"`device` ('{text}') is not in the table: {nearest(text.lower(), known)}. For another one, give its "
            "values in a yaml file with the keys of hf_veomni/planner/devices.yaml."
        )
    return known[text.lower()]


def identify_device(name: str, memory_gib: float) -> Device:
    """The device of the table that a process sees.

    Args:
        name: as torch has it ("NVIDIA H100 80GB HBM3").
        memory_gib: that it has in all.

    Raises:
        UnsupportedError: it is none of the table.
    """
    for device in known_devices().values():
        fits = abs(memory_gib - device.memory_gib) <= _NEAR * device.memory_gib
        if device.torch_name and re.search(rf"\b{device.torch_name}\b", name) and fits and not _LESSER.search(name):
            return device
    raise UnsupportedError(
        f"The device '{name}' with {memory_gib:.1f} GiB is not in the table of hf_veomni/planner/devices.yaml "
        f"({', '.join(known_devices())}): name the one that it is like, or a yaml file with its values."
    )


def _device(key: str, entry: object) -> Device:
    if not isinstance(entry, Mapping):
        raise ValueError(f"Device '{key}' ({entry!r}) must be a mapping such as 'memory_gib: 80'.")
    names = {field.name for field in fields(Device)}
    for wrong in sorted(map(str, entry.keys() - names)):
        raise ValueError(f"Device '{key}' has the unknown key '{wrong}': {nearest(wrong, names)}.")
    if missing := sorted(names - set(_TEXTS) - entry.keys()):
        raise ValueError(f"Device '{key}' lacks {', '.join(missing)}: give all of them, see devices.yaml.")
    values = {"name": key, "measured": [], **entry}
    for name in _TEXTS:
        value = values.get(name, "")
        texts = value if name == "measured" else [value]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            kind = "a list of names" if name == "measured" else "a text"
            raise ValueError(f"`{name}` ({value!r}) of device '{key}' must be {kind}.")
    return Device(**{**values, "measured": tuple(values["measured"])})
