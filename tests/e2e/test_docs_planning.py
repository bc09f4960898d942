"""The Python blocks of docs/planning.md run, one after the other, and its commands are those that there are."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from hf_veomni.cli import app
from tests.e2e.launching import ROOT

PAGE = (ROOT / "docs/planning.md").read_text()


def test_blocks_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), "planning.md", "exec"), {})


def test_options_are_those_of_the_commands() -> None:
    shown = "".join(
        CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for name in ("plan", "dry-run", "doctor")
    )
    for option in set(re.findall(r"`(--[a-z-]+)`", PAGE)) | set(
        re.findall(r"^hf-veomni .*?(--[a-z-]+)", PAGE, flags=re.M)
    ):
        assert option in shown, option
