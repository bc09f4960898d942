"""The drawing of docs/architecture.md is what its script draws, and the files in it exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.launching import ROOT, python


@pytest.mark.everyday
@pytest.mark.parametrize("name", ["architecture", "packed_sequence"])
def test_drawings_are_what_their_scripts_draw(tmp_path: Path, name: str) -> None:
    python(str(ROOT / f"docs/draw_{name}.py"), "drawn.svg", cwd=tmp_path)
    assert (tmp_path / "drawn.svg").read_text() == (ROOT / f"docs/images/{name}.svg").read_text()


def test_files_of_the_drawing_exist() -> None:
    pytest.importorskip("matplotlib")
    from docs.draw_architecture import STEPS

    paths = [getattr(step, "file", "") for step in STEPS]
    named = [path for path in paths if path.endswith(".py")]
    assert len(named) > 10
    for path in named:
        folder = path.partition("/")[0]
        for name in re.findall(r"\w+\.py", path):
            assert (ROOT / "hf_veomni" / folder / name).exists(), path
