"""What the pages under docs/ show runs: their Python blocks, and the files that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

from make_moe_checkpoint import make_moe_checkpoint
from tests.e2e.launching import ROOT, launch

PAGE = (ROOT / "docs/experts.md").read_text()


def test_blocks_of_experts_run(tmp_path: Path, tiny_checkpoint: Path) -> None:
    make_moe_checkpoint(tmp_path / "outputs/checkpoints/smollm2-135m-moe", tiny_checkpoint)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
    assert len(blocks) == 2
    (tmp_path / "blocks.py").write_text("\n".join(blocks))
    launch("cpu_sp2.yaml", "blocks.py", cwd=tmp_path)


def test_files_of_experts_exist() -> None:
    configs = {path.name for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert set(re.findall(r"`(?:accelerate_configs/)?(\w+\.yaml)`", PAGE)) <= configs
    for path in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
