"""Configs of which transformers makes no model, and commands that could not finish, refused before planning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_veomni.cli import app
from hf_veomni.planner import plan_layouts


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen3", "hidden_size": "x"}, "has no config that transformers reads.*expected int, got str"),
        ({"model_type": "qwen3", "num_attention_heads": 0}, "Qwen3Config of which transformers makes no model"),
        ({"model_type": "llama", "num_attention_heads": 0}, "correct its sizes|no config that transformers reads"),
        ({"model_type": "qwen3", "hidden_size": -4}, "Qwen3Config .*negative dimension.*above 0"),
        ({"model_type": "qwen3", "num_hidden_layers": 0}, "no layers: set `num_hidden_layers` above 0"),
        ({"model_type": "qwen3_omni_moe"}, "Qwen3OmniMoeConfig, of which .*AutoModel makes no model"),
    ],
)
def test_refuses_configs_of_no_model(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        plan_layouts(tmp_path, 2, "h100-80gb", context=512)


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_veomni.cli_foresight.find_spec", lambda name: None)
    options = ["--world-size", "8", "--device", "h100-80gb", "--picture", str(tmp_path / "x.png")]
    result = CliRunner().invoke(app, ["plan", str(tmp_path), *options], terminal_width=200)
    assert result.exit_code == 2 and "hf-veomni[plot]" in result.output
