"""What docs/trainer.md shows runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.training import tiny_model

PAGE = (Path(__file__).parents[2] / "docs/trainer.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_classes_for_trl(tmp_path):
    pytest.importorskip("trl", reason="needs the extra `trl`")
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(BLOCKS[0], "docs/trainer.md", "exec", dont_inherit=True), names)
    for kind in ("SFT", "DPO"):
        arguments = names[f"{kind}Arguments"](output_dir=str(tmp_path), use_cpu=True, report_to=[])
        assert arguments.plan.world_size == 1
        assert names[f"Omni{kind}"].__mro__[1].__name__ == "OmniTrainerMixin"


def test_flops_of_a_batch():
    names: dict[str, Any] = {"model": tiny_model(), "batch": {"input_ids": torch.ones(2, 8, dtype=torch.long)}}
    exec(compile(BLOCKS[1], "docs/trainer.md", "exec", dont_inherit=True), names)
    assert names["tokens"] == 16 and names["total"] > 16 * 6 * 32 * 48


def test_plans_that_save_memory():
    names: dict[str, Any] = {}
    for block, rule in ((2, {"checkpointing": "keep"}), (3, {"tokens": "tiled"})):
        exec(compile(BLOCKS[block], "docs/trainer.md", "exec", dont_inherit=True), names)
        assert [*names["plan"].modules.values()] == [rule]


def test_compile_layers():
    names: dict[str, Any] = {"model": tiny_model(), "plan": "sp=1"}
    exec(compile(BLOCKS[4], "docs/trainer.md", "exec", dont_inherit=True), names)
    assert all(layer._compiled_call_impl is not None for layer in names["model"].model.layers)
