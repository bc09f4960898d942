"""A stock vision-language model on a folder of images, by the script that a person would start from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

from digit_chats import make_digit_chats
from finetune_vlm import ScriptArguments, encoder_parts, load_processor, trained_parts
from make_vlm_checkpoint import make_vlm_checkpoint
from tests.e2e.launching import ROOT, launch, python

SCRIPT = str(ROOT / "examples/finetune_vlm.py")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("vlm")
    model = make_vlm_checkpoint(folder / "model", tiny_checkpoint)
    data = make_digit_chats(folder / "data", limit=96)
    return ["--model", str(model), "--data", str(data), "--dtype", "float32", "--max_tokens", "512"]


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_two_ranks_train_as_one_process(inputs: list[str], tmp_path: Path) -> None:
    options = [*inputs, "--max_steps", "6", "--learning_rate", "1e-3", "--train_encoder"]
    _, output = launch("cpu_sp2.yaml", SCRIPT, *options, "--output_dir", str(tmp_path / "two"))
    python(SCRIPT, *options, "--use_cpu", "--output_dir", str(tmp_path / "one"))
    two, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    for name in ("before", "after"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)
    assert two["train"]["train_loss"] == pytest.approx(one["train"]["train_loss"], rel=1e-5)
    assert two["after"] < two["before"] - 0.1
    assert f"of {two['asked']}, see answers.png" in output and two["asked"] == 16
    assert (tmp_path / "two/answers.png").stat().st_size > 5_000
    assert (tmp_path / "two/processor_config.json").is_file()


@pytest.mark.slow
def test_adapters_are_in_the_language_model_alone(inputs: list[str], tmp_path: Path) -> None:
    python(SCRIPT, *inputs, "--max_steps", "1", "--use_cpu", "--output_dir", str(tmp_path))
    names = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert names and all("language_model" in name and "lora_" in name for name in names)


def test_a_folder_without_a_jsonl_names_the_way_out(inputs: list[str], tmp_path: Path) -> None:
    status, output = python(SCRIPT, *inputs[:2], "--data", str(tmp_path), "--use_cpu", check=False)
    assert status == 1 and "holds no train.jsonl: `python examples/digit_chats.py` writes such a folder." in output


def test_options_without_effect_are_refused(inputs: list[str]) -> None:
    with pytest.raises(ValueError, match="`max_pixels` .784. has no effect on SiglipImageProcessorPil"):
        load_processor(ScriptArguments(model=inputs[1], max_pixels=784))
    with pytest.raises(ValueError, match="`train_encoder` finds no encoder in Linear"):
        encoder_parts(nn.Linear(1, 1))


def test_the_projector_may_be_trained_without_the_encoder() -> None:
    model = nn.ModuleDict({"model": nn.ModuleDict({"vision_tower": nn.Linear(1, 1), "connector": nn.Linear(1, 1)})})
    assert trained_parts(model, ScriptArguments()) == []
    assert trained_parts(model, ScriptArguments(train_projector=True)) == ["model.connector"]
    assert trained_parts(model, ScriptArguments(train_encoder=True)) == ["model.vision_tower", "model.connector"]
    with pytest.raises(ValueError, match="finds no projector beside visual in ModuleDict: use `train_encoder`"):
        trained_parts(nn.ModuleDict({"visual": nn.Linear(1, 1)}), ScriptArguments(train_projector=True))


def test_the_page_runs(inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/vision-language.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    (tmp_path / "outputs/checkpoints").mkdir(parents=True)
    (tmp_path / "outputs/checkpoints/smollm2-135m-llava").symlink_to(inputs[1])
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/vision-language.md", "exec"), {})
    (sample,) = re.findall(r"^```json\n(.*?)^```$", page, flags=re.M | re.S)
    assert json.loads(sample).keys() == {"messages", "images"}
