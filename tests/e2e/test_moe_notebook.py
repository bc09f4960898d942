"""The notebook of a mixture of experts: what is committed shows a complete run, and it runs again on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from make_moe_checkpoint import make_moe_checkpoint
from notebooks.execute import execute
from tests.e2e.launching import ROOT
from tests.e2e.test_notebook import MACHINE_PATH, code_cells, outputs, picture_sizes, printed

NOTEBOOK = ROOT / "notebooks" / "mixture_of_experts.ipynb"


def assert_clean(notebook: nbformat.NotebookNode) -> None:
    lines = printed(notebook, "stderr").splitlines()
    assert [line for line in lines if not line.startswith("hf_veomni: MixtralForCausalLM under the plan")] == []
    assert {output.output_type for output in outputs(notebook)} == {"stream", "display_data"}
    assert len(picture_sizes(notebook)) == 3
    assert "process 1: part 2 of 2 of the tokens, experts [2, 3]" in printed(notebook)
    assert "tokens that were routed and not computed: 0" in printed(notebook)


def test_committed_outputs_show_a_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert_clean(notebook)
    before, after = map(float, re.findall(r"included: ([\d.]+) -> ([\d.]+)", printed(notebook))[0])
    assert after < before - 0.1
    text = NOTEBOOK.read_text()
    assert len(text) < 400_000 and MACHINE_PATH.findall(text) == []


@pytest.mark.slow
def test_notebook_runs_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    parameters = {
        "MODEL": str(make_moe_checkpoint(tmp_path / "model", tiny_checkpoint)),
        "OUTPUT": str(tmp_path / "adapter"),
        "MAX_STEPS": 3,
        "MAX_TOKENS": 256,
        "LAYER": 1,
        "SHOWN_TOKENS": 64,
        "DTYPE": "float32",
    }
    assert_clean(execute(NOTEBOOK, parameters, limit=240))
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
