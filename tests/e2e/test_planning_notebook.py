"""The notebook that plans 128 GPUs: what is committed shows a complete run, and it runs again on a smaller model."""

from __future__ import annotations

import re

import nbformat
import pytest

from notebooks.execute import execute
from tests.e2e.launching import ROOT
from tests.e2e.test_notebook import MACHINE_PATH, code_cells, outputs, picture_sizes, printed

NOTEBOOK = ROOT / "notebooks" / "planning.ipynb"
PEAKS = re.compile(r"predicted ([\d.]+) GiB of tensors, dry run ([\d.]+) GiB")


def assert_clean(notebook: nbformat.NotebookNode) -> None:
    lines = printed(notebook, "stderr").splitlines()
    assert [line for line in lines if not line.startswith("hf_veomni: Qwen3MoeForCausalLM under the plan")] == []
    assert {output.output_type for output in outputs(notebook)} == {"stream", "display_data"}
    assert len(picture_sizes(notebook)) == 3
    predicted, found = map(float, PEAKS.findall(printed(notebook))[0])
    assert predicted == pytest.approx(found, rel=0.2)  # docs/planning.md names the gaps


def test_committed_outputs_show_a_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert_clean(notebook)
    assert "30.5B parameters, of which a token uses 2.7B" in printed(notebook)
    assert "layouts of 128 ranks" in printed(notebook) and "num_processes: 128" in printed(notebook)
    text = NOTEBOOK.read_text()
    assert len(text) < 400_000 and MACHINE_PATH.findall(text) == []


@pytest.mark.slow
def test_notebook_runs_again() -> None:
    notebook = execute(NOTEBOOK, {"NUM_LAYERS": 4, "WORLD_SIZE": 16, "BATCH": 16}, limit=240)
    assert_clean(notebook)
    assert "layouts of 16 ranks" in printed(notebook)
