"""What docs/packing.md shows runs, on a tiny model and with no download; and the names and files in it exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hf_veomni.data.modalities import ITEM_COLUMNS, TOKEN_COLUMNS
from tests.e2e.launching import ROOT
from tests.multimodal import build, pictures

PAGE = (ROOT / "docs/packing.md").read_text()


class _Stored:
    """Stands in for the Auto classes."""

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def from_pretrained(self, name: str) -> Any:
        return self.kept


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build("qwen2_5_vl")
    monkeypatch.setattr("transformers.AutoModelForImageTextToText", _Stored(model))
    monkeypatch.setattr("transformers.AutoProcessor", _Stored(processor))
    monkeypatch.chdir(tmp_path)
    for index, picture in enumerate(pictures()):
        Image.fromarray(picture).save(f"{index}.png")
    lines = [json.dumps({"text": f"words {i}"}) for i in range(9)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    names: dict[str, Any] = {"paths": sorted(map(str, tmp_path.glob("*.png")))}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/packing.md", "exec"), names)
    (batch,) = [names["collator"]([row]) for row in names["packed"]]
    assert len(batch["image_grid_thw"]) == 4
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] != -100]) == "A seven.<|im_end|>" * 4
    mixed = [sample for row in names["stream"] for sample in row["samples"]]
    assert len(mixed) >= 4 and all(("messages" in sample) != ("text" in sample) for sample in mixed)


def test_names_and_files_exist() -> None:
    (row,) = re.findall(r"^\| processed \|.*$", PAGE, flags=re.M)
    named = re.findall(r"`(\w+)`", row)
    assert len(named) > 6 and set(named) <= {*ITEM_COLUMNS, *TOKEN_COLUMNS}
    for path in re.findall(r"`((?:tests|hf_veomni|benchmarks)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
