"""What docs/accelerate.md shows runs on two ranks."""

from __future__ import annotations

import re
from contextlib import chdir
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from tests.ranks.parity import relative_error, whole
from tests.ranks.training import PackedRows, collate, tiny_model

PAGE = (Path(__file__).parents[2] / "docs/accelerate.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def _blocks(folder: Path) -> dict[str, torch.Tensor]:
    loader = DataLoader(PackedRows(4), batch_size=1, collate_fn=collate)
    names = {"model": tiny_model(), "other": tiny_model(), "plan": "sp=2", "loader": loader}
    with chdir(folder):
        for block in BLOCKS:
            exec(compile(block, "docs/accelerate.md", "exec", dont_inherit=True), names)
    other = names["other"]
    ids = torch.arange(3, 15)[None]
    other(input_ids=ids, labels=ids).loss.backward()  # type: ignore[operator]
    return {name: whole(p.grad) for name, p in other.named_parameters()}  # type: ignore[attr-defined]


def test_blocks_run(ranks, tmp_path):
    found = ranks(2).run(_blocks, tmp_path, timeout=90)
    saved, start = AutoModelForCausalLM.from_pretrained(tmp_path / "outputs/model"), tiny_model()
    assert not torch.equal(saved.lm_head.weight, start.lm_head.weight)
    ids = torch.arange(3, 15)[None]
    start(input_ids=ids, labels=ids).loss.backward()
    for gradients in found:  # `build_parallelize_model` has the gradients of the stock model
        assert all(relative_error(gradients[name], p.grad) < 1e-5 for name, p in start.named_parameters())
