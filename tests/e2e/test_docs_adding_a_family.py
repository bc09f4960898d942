"""What docs/adding-a-family.md shows runs; the files and names that it and the pages of the folders point to exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launching import ROOT

PAGE = ROOT / "docs/adding-a-family.md"
READMES = sorted((ROOT / "hf_veomni").glob("*/README.md"))


def test_blocks_run() -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", [PAGE, *READMES, ROOT / "CONTRIBUTING.md"], ids=str)
def test_files_exist(page: Path) -> None:
    places = (page.parent, ROOT / "hf_veomni", ROOT, ROOT / "docs")
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|yaml|txt|toml|json))`", page.read_text()))
    assert named
    for path in named:
        assert any((place / path).exists() for place in places), path


def test_names_exist_in_the_files_beside_them() -> None:
    """`name` in `file.py`, and rows of tables whose first cells name sets and a file."""
    text = PAGE.read_text()
    pairs = re.findall(r"`([\w.]+)` (?:in|of) `([\w/]+\.py)`", text)
    for names, file in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `([\w/]+\.py)` \|", text, flags=re.M):
        pairs += [(name, file) for name in re.findall(r"\w+", names)]
    assert len(pairs) > 8
    for name, file in pairs:
        path = ROOT / "hf_veomni" / file
        assert name in (path if path.exists() else ROOT / file).read_text(), (name, file)
