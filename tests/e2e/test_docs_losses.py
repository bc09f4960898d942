"""What docs/losses.md shows runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_veomni import get_parallel_state
from tests.ranks.training import tiny_model

PAGE = (Path(__file__).parents[2] / "docs/losses.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_losses_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    row = {"input_ids": [5, 9, 17, 4, 8], "labels": [5, 9, 17, 4, 8]}
    models = {"model": tiny_model(), "fresh": tiny_model()}
    names: dict[str, Any] = {"__name__": "page", "rows": Dataset.from_list([row] * 16), **models}
    for block in BLOCKS:
        exec(compile(block, "docs/losses.md", "exec", dont_inherit=True), names)
    assert get_parallel_state(names["model"]).world_size == 1
    assert names["trainer"].model.config._attn_implementation == "sdpa"
