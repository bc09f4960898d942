"""What docs/omni.md shows runs, and the keys that it names are those of the parts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.e2e.launching import ROOT, python

PAGE = (ROOT / "docs/omni.md").read_text()


def test_block_runs(tmp_path: Path, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "outputs/checkpoints/smollm2-135m")
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
    (tmp_path / "block.py").write_text(block)
    python("block.py", cwd=tmp_path)
    assert (tmp_path / "outputs/omni/model.safetensors").is_file()


def test_names_of_parts_exist() -> None:
    import hf_veomni

    for mixin, methods in re.findall(r"`(\w+Mixin)` \(([^)]*)\)", PAGE):
        for method in re.findall(r"`(\w+)`", methods):
            kind = getattr(hf_veomni, mixin)
            assert hasattr(kind, method) or method in kind.__annotations__, method
