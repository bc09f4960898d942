"""Run a notebook from top to bottom and store what it shows in it: what `make notebook` does.

    python notebooks/execute.py notebooks/lora_quickstart.ipynb

Like `jupyter execute --inplace`, but equal outputs give equal files: pieces of one stream are joined, and no times are
kept.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1800  # seconds for one cell


def execute(path: Path, parameters: Mapping[str, Any] | None = None, limit: float = LIMIT) -> nbformat.NotebookNode:
    """The notebook with its outputs; the file stays as it is.

    Args:
        parameters: values for names of the cell that is tagged "parameters".
        limit: seconds that one cell may take.

    Raises:
        ValueError: a parameter that the notebook does not have.
        nbclient.exceptions.CellExecutionError: a cell failed.
        nbclient.exceptions.CellTimeoutError: a cell took longer than `limit`.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        insert_parameters(notebook, parameters)
    client = NotebookClient(
        notebook,
        timeout=limit,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    # The working tree's package, installed or not.
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    return notebook


def insert_parameters(notebook: nbformat.NotebookNode, parameters: Mapping[str, Any]) -> None:
    """Put a cell with other values behind the cell tagged "parameters"."""
    index = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    names = [line.split(" = ")[0] for line in notebook.cells[index].source.splitlines()]
    for name in parameters:
        if name not in names:
            raise ValueError(f"`{name}` is no parameter of the notebook: use {', '.join(names)}.")
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(source))


def main() -> None:
    for name in sys.argv[1:]:
        notebook = execute(Path(name).resolve())
        nbformat.write(notebook, name)
        print(f"{name}: outputs stored")


if __name__ == "__main__":
    main()
