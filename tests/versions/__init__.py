"""The fast suite on other versions than the everyday ones: a set is a constraints file and its last result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
SETS = ("floor", "newest")  # constraints-NAME.txt, run by `make test-NAME`


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path) -> dict[str, str]:
    """Versions that a constraints file pins, by canonical name of the package."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, version in pins}


def read_results() -> dict[str, dict[str, Any]]:
    """What `python -m tests.versions NAME` wrote last for each set."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
