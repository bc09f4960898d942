"""The notebook: what is committed shows a complete run, and it runs again, with the numbers of the script."""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path

import nbformat
import pytest
from safetensors.torch import load_file

from notebooks.execute import execute
from tests.e2e.launching import ROOT, python

NOTEBOOK = ROOT / "notebooks" / "lora_quickstart.ipynb"
LIMIT = 240  # seconds a cell
NUM_PICTURES = 3
HELD_OUT = re.compile(r"held-out loss ([\d.]+) -> ([\d.]+), (\d+) steps")
# The first folder of a path that only means something on the machine that ran it.
MACHINE_PATH = re.compile(r"(?<![\w./~])/(?:home|root|work|workspace|tmp|usr|opt|var|mnt|Users)/[^\s\"']*")


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook: nbformat.NotebookNode, stream: str = "stdout") -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == stream)


def picture_sizes(notebook: nbformat.NotebookNode) -> list[tuple[int, int]]:
    """Width and height of every image, from the header of its png."""
    pictures = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [struct.unpack(">II", base64.b64decode(picture)[16:24]) for picture in pictures]


def assert_clean(notebook: nbformat.NotebookNode) -> None:
    """No errors, no warnings, and the three plots. The plan in force is named where a run begins."""
    lines = printed(notebook, "stderr").splitlines()
    assert [line for line in lines if not line.startswith("hf_veomni: LlamaForCausalLM under the plan")] == []
    assert {output.output_type for output in outputs(notebook)} == {"stream", "display_data"}
    assert len(picture_sizes(notebook)) == NUM_PICTURES
    assert all(width > 500 and height > 250 for width, height in picture_sizes(notebook))


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def test_committed_outputs_show_a_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert_clean(notebook)
    found = HELD_OUT.search(printed(notebook))
    assert found is not None
    assert float(found[2]) < float(found[1]) and int(found[3]) >= 6
    losses = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", printed(notebook))]
    assert len(losses) == int(found[3])
    assert float(re.findall(r"([\d.]+)% full", printed(notebook))[0]) > 95


def test_committed_file_is_fit_to_commit() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 400_000
    assert MACHINE_PATH.findall(text) == []
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all("execution" not in cell.metadata for cell in notebook.cells), "times: use `make notebook`"


# Put together from pieces, so that a scan for machine paths passes this file over.
@pytest.mark.parametrize("before", ["", 'in "', "("])
@pytest.mark.parametrize("folder", ["home", "tmp", "root"])
def test_machine_paths_are_found(before: str, folder: str) -> None:
    assert MACHINE_PATH.search("/".join([before, folder, "me", "x.py"]))


def test_unknown_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="`MAX_STEP` is no parameter of the notebook: use MODEL, .*MAX_STEPS"):
        execute(NOTEBOOK, {"MAX_STEP": 2})


@pytest.mark.real_model
@pytest.mark.slow
def test_notebook_trains_the_real_model(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    sizes = {"MAX_STEPS": 3, "MAX_TOKENS": 256, "MAX_EVAL_ROWS": 2}
    notebook = execute(NOTEBOOK, {"MODEL": str(smollm2_checkpoint), "OUTPUT": str(output), **sizes}, LIMIT)
    assert_clean(notebook)
    found = metrics(output)
    assert found["world_size"] == 2 and len(found["train_losses"]) == 3
    assert found["eval_loss_after"] < found["eval_loss_before"] < 5
    learned = [tensor for name, tensor in load_file(output / "adapter_model.safetensors").items() if "lora_B" in name]
    assert len(learned) == 4 * 30 and all(tensor.abs().max() > 0 for tensor in learned)
    assert re.search(r"before: .+\n +after: +.+", printed(notebook))


def test_notebook_equals_script_in_one_process(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The two processes of the notebook compute what the script computes in one."""
    sizes = {"MAX_STEPS": 4, "MAX_TOKENS": 512}
    model = {"MODEL": str(tiny_checkpoint), "DTYPE": "float32"}
    notebook = execute(NOTEBOOK, {**model, **sizes, "OUTPUT": str(tmp_path / "notebook")}, LIMIT)
    assert_clean(notebook)
    options = [text for name, value in {**model, **sizes}.items() for text in (f"--{name.lower()}", str(value))]
    python("examples/finetune_lora.py", *options, "--output_dir", str(tmp_path / "script"))
    found, wanted = metrics(tmp_path / "notebook"), metrics(tmp_path / "script")
    assert (found["world_size"], wanted["world_size"]) == (2, 1)
    for name in ("train_losses", "eval_loss_before", "eval_loss_after"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5)
