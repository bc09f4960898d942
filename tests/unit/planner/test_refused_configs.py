"""Configs of which transformers makes no model, and commands that could not finish, refused before planning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_veomni import UnsupportedError
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


EXPERTS = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2}
FP32: dict[str, Any] = {"device": "h100-80gb", "context": 512, "mixed_precision": True, "fp32": True}


def test_refuses_experts_in_fp32_on_a_rank_alone(tmp_path: Path) -> None:
    """Autocast knows no grouped matmul."""
    (tmp_path / "config.json").write_text(json.dumps(EXPERTS))
    with pytest.raises(UnsupportedError, match="`fp32`, True.*Qwen3Moe.*experts in fp32.*in bf16, train.*`lora`"):
        plan_layouts(tmp_path, 1, **FP32)
    arguments = ["plan", str(tmp_path), "--world-size", "1", "--device", "h100-80gb", "--context", "512"]
    result = CliRunner().invoke(app, [*arguments, "--mixed-precision", "--fp32"], terminal_width=200)
    assert result.exit_code == 2 and "on a rank alone" in result.output
    for world, options in ((1, {"lora": 16}), (1, {"fp32": False})):
        assert plan_layouts(tmp_path, world, **{**FP32, **options}).entries
    stages = [entry.layout.pp for entry in plan_layouts(tmp_path, 2, **FP32).entries]
    assert stages and set(stages) == {1}  # a stage of one rank is alone, too


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_veomni.cli_foresight.find_spec", lambda name: None)
    options = ["--world-size", "8", "--device", "h100-80gb", "--picture", str(tmp_path / "x.png")]
    result = CliRunner().invoke(app, ["plan", str(tmp_path), *options], terminal_width=200)
    assert result.exit_code == 2 and "hf-veomni[plot]" in result.output
