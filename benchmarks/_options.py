"""What the command lines of benchmarks that run on a CPU and on a GPU have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch


def device_parser(description: str, dtypes: Mapping[str, Any]) -> argparse.ArgumentParser:
    """A parser that has `--device` and `--dtype`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=[*dtypes])
    return parser


def parse_for_device(parser: argparse.ArgumentParser, defaults: Mapping[str, Mapping[str, Any]]) -> argparse.Namespace:
    """Parse the command line, choose the device and fill in what was not given from `defaults[device]`."""
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in defaults[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options
