"""The notebook of a vision-language model: what is committed shows a complete run, and it runs again."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from digit_chats import make_digit_chats
from make_vlm_checkpoint import make_vlm_checkpoint
from notebooks.execute import execute
from tests.e2e.launching import ROOT
from tests.e2e.test_notebook import MACHINE_PATH, code_cells, outputs, picture_sizes, printed

NOTEBOOK = ROOT / "notebooks" / "vision_language.ipynb"
NUM_PICTURES = 4
RIGHT = re.compile(r"(\d+) of (\d+) are right")


def assert_clean(notebook: nbformat.NotebookNode) -> None:
    lines = printed(notebook, "stderr").splitlines()
    assert [line for line in lines if not line.startswith("hf_veomni: LlavaForConditionalGeneration under the")] == []
    assert {output.output_type for output in outputs(notebook)} == {"stream", "display_data"}
    assert len(picture_sizes(notebook)) == NUM_PICTURES


def test_committed_outputs_show_a_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert_clean(notebook)
    found = RIGHT.search(printed(notebook))
    assert found is not None and int(found[1]) >= 20 and int(found[2]) == 24
    before, after = map(float, re.findall(r"held-out loss ([\d.]+) -> ([\d.]+)", printed(notebook))[0])
    assert after < before / 20
    text = NOTEBOOK.read_text()
    assert len(text) < 400_000 and MACHINE_PATH.findall(text) == []


@pytest.mark.slow
def test_notebook_runs_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = make_digit_chats(tmp_path / "data", limit=180)
    parameters = {
        "MODEL": str(make_vlm_checkpoint(tmp_path / "model", tiny_checkpoint, pretrain=data)),
        "DATA": str(data),
        "OUTPUT": str(tmp_path / "adapter"),
        "MAX_STEPS": 3,
        "MAX_TOKENS": 512,
        "DTYPE": "float32",
    }
    notebook = execute(NOTEBOOK, parameters, limit=240)
    assert_clean(notebook)
    assert RIGHT.search(printed(notebook)) is not None
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_an_encoder_needs_chats_to_learn_from(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no train.jsonl: examples/digit_chats.py writes such a folder"):
        make_vlm_checkpoint(tmp_path / "model", tiny_checkpoint, pretrain=tmp_path)
    assert not (tmp_path / "model").exists()
