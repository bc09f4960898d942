"""The notebook of a composed model: what is committed shows a complete run, and it runs again with a few steps."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from notebooks.execute import execute
from tests.e2e.launching import ROOT
from tests.e2e.test_notebook import MACHINE_PATH, code_cells, outputs, picture_sizes, printed

NOTEBOOK = ROOT / "notebooks" / "omni.ipynb"


def assert_clean(notebook: nbformat.NotebookNode) -> None:
    lines = printed(notebook, "stderr").splitlines()
    assert [line for line in lines if not line.startswith("hf_veomni: OmniModel under the plan sp=2")] == []
    assert {output.output_type for output in outputs(notebook)} == {"stream", "display_data"}
    assert len(picture_sizes(notebook)) == 5


def test_committed_outputs_show_a_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert_clean(notebook)
    read, listened = ((int(right), int(count)) for right, count in re.findall(r"(\d+) of (\d+)", printed(notebook)))
    assert read[0] > 0.8 * read[1] and listened[0] > 0.7 * listened[1]  # chance is one in ten
    of_text, of_speech = map(int, re.findall(r"drawn from \w+: (\d+)%", printed(notebook)))
    assert of_text > 60 and of_speech > 40
    text = NOTEBOOK.read_text()
    assert len(text) < 400_000 and MACHINE_PATH.findall(text) == []


@pytest.mark.slow
def test_notebook_runs_again(tmp_path: Path) -> None:
    few = {"MAX_STEPS": 2, "VQ_STEPS": 4, "BATCH": 12, "NUM_VOICES": 1}
    assert_clean(execute(NOTEBOOK, {"OUTPUT": str(tmp_path), **few}, limit=240))
    assert (tmp_path / "model.safetensors").is_file()
