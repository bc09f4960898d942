"""What docs/pipeline.md shows runs on two ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.models import build_model, packed_batch

PAGE = (Path(__file__).parents[2] / "docs/pipeline.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def _blocks() -> float:
    windows = [[packed_batch((5, 9), seed=0), packed_batch((3, 4, 8), seed=1)]] * 3
    names: dict[str, Any] = {"model": build_model("llama"), "windows": windows}
    for block in BLOCKS:
        exec(compile(block, "docs/pipeline.md", "exec", dont_inherit=True), names)
    return names["loss"].item()


def test_blocks_run(ranks) -> None:
    assert BLOCKS
    first, second = ranks(2).run(_blocks, timeout=90)
    assert first == second
