"""What the README shows runs: its Python blocks, and both sides of its diff, with the same losses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.e2e.launching import ROOT, launch, python

TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.M | re.S)


def side(diff: str, sign: str) -> str:
    """The script before (sign "-") or after ("+") the diff."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign)) + "\n"


@pytest.fixture
def home(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A folder in which the README's paths exist."""
    shutil.copytree(tiny_checkpoint, tmp_path / "outputs/checkpoints/smollm2-135m")
    rows = [
        {"input_ids": ids, "labels": ids} for ids in ([3 + (7 * i + j) % 500 for j in range(96)] for i in range(8))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"'train_loss': '?([\d.]+)", output)]


def test_the_diff_has_three_lines_and_changes_no_loss(home: Path) -> None:
    (diff,) = blocks("diff")
    assert sum(line.startswith("+") for line in diff.splitlines()) == 3
    for sign, name in (("-", "stock.py"), ("+", "omni.py")):
        (home / name).write_text(side(diff, sign).replace("max_steps=100", 'max_steps=3, report_to="none"'))
    _, stock = python("stock.py", cwd=home)
    _, omni = launch("cpu_sp2.yaml", "omni.py", cwd=home)
    assert len(losses(stock)) == len(losses(omni)) == 1
    assert losses(omni) == pytest.approx(losses(stock), rel=1e-3)  # as far as the log prints digits


def test_python_blocks_run(home: Path) -> None:
    start = 'from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("%s")\n'
    script = start % "outputs/checkpoints/smollm2-135m" + "\n".join(blocks("python"))
    assert len(blocks("python")) >= 3
    (home / "blocks.py").write_text(script)
    launch("cpu_sp2.yaml", "blocks.py", cwd=home)


def test_commands_exist() -> None:
    rules = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    targets = {target for rule in rules for target in rule.split()}
    mentioned = set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, flags=re.M))
    assert {"demo", "test"} <= mentioned <= targets
    for path in re.findall(r"`((?:examples|docs|accelerate_configs)/[\w./]*)`", TEXT):
        assert (ROOT / path).exists(), path


def test_ci_runs_the_readmes_test_command() -> None:
    assert "exec make test\n" in (ROOT / ".ci/run").read_text()
