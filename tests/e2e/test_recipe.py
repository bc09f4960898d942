"""`hf-veomni train`: a yaml file trains as the script that it stands for, and is checked before a model is loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_veomni.cli import app
from hf_veomni.recipe import Recipe

CHATS = [
    [{"role": "user", "content": f"What is {i} + 3?"}, {"role": "assistant", "content": f"It is {i + 3}."}]
    for i in range(24)
]


@pytest.fixture
def home(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    arguments = {"output_dir": "out", "max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    arguments |= {"per_device_train_batch_size": 1, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-3}
    recipe = {
        "model": str(tiny_checkpoint),
        "data": {"path": "chats.jsonl", "max_tokens": 128, "eval_fraction": 0.25},
        "plan": "sp=2",
        "lora": {"r": 4},
        "dtype": "float32",
        "processes": 2,
        "arguments": arguments,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def _train(*arguments: str) -> str:
    command = [sys.executable, "-c", "from hf_veomni.cli import main; main()", "train", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_trains_an_adapter_on_two_processes(home: Path, tiny_checkpoint: Path) -> None:
    printed = _train("recipe.yaml", "--print-script")
    assert not (home / "out").exists()
    output = _train("recipe.yaml")
    assert (home / "out/train.py").read_text().strip() == printed.strip()
    assert "under the plan sp=2, 2 ranks on cpu" in output and "eval_loss" in output
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), str(home / "out"))
    # Only what the assistant says is trained on, and the file alone gives the same run on one process.
    values = yaml.safe_load(Path("recipe.yaml").read_text()) | {"plan": "", "processes": 1}
    values["arguments"] = values["arguments"] | {"output_dir": "alone"}
    Path("alone.yaml").write_text(yaml.safe_dump(values))
    alone = _train("alone.yaml")

    assert _numbers(output, "loss") == pytest.approx(_numbers(alone, "loss"), rel=1e-3)
    assert _numbers(output, "eval_loss") == pytest.approx(_numbers(alone, "eval_loss"), rel=1e-3)


def _numbers(text: str, name: str) -> list[float]:
    found = [float(value) for value in re.findall(rf"'{name}': '?([\d.e-]+)", text)]
    assert found
    return found


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"modell": "x"}, "Unknown key 'modell' in the recipe: did you mean 'model'"),
        ({"data": {"path": "chats.jsonl"}}, "`max_tokens` is missing in the recipe's `data`"),
        ({"data": {"path": "none.jsonl", "max_tokens": 8}}, r"`data.path` \(none.jsonl\) does not exist"),
        ({"data": {"path": "chats.jsonl", "max_tokens": 8, "train_on": "user"}}, "must be 'assistant', 'last' or"),
        ({"plan": "tp=2"}, "there is no tensor parallelism"),
        ({"lora": {"rank": 8}}, "Unknown key 'rank' in the recipe's `lora`: PEFT calls it `r`"),
        ({"lora": True}, r"`lora` \(True\) must be a mapping"),
        ({"processes": 3}, r"must divide the number of ranks \(3\)"),
        ({"arguments": {"output_dir": "out", "learning_rat": 1}}, "Unknown key 'learning_rat'.*learning_rate"),
        ({"arguments": {}}, "`arguments` must be a mapping with `output_dir`"),
        ({"model": "/nowhere"}, r"`model` \(/nowhere\) is no folder"),
    ],
)
def test_what_is_wrong_is_named(home: Path, change: dict, match: str) -> None:
    values = yaml.safe_load(Path("recipe.yaml").read_text()) | change
    Path("wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=match):
        recipe = Recipe.from_yaml("wrong.yaml")
        recipe.script()
    result = CliRunner().invoke(app, ["train", "wrong.yaml"], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_a_learning_rate_may_be_written_without_a_dot(home: Path) -> None:
    text = Path("recipe.yaml").read_text().replace("learning_rate: 0.001", "learning_rate: 2e-4\n  run_name: '1e5'")
    Path("recipe.yaml").write_text(text)
    arguments = Recipe.from_yaml("recipe.yaml").arguments
    assert arguments["learning_rate"] == 2e-4 and arguments["run_name"] == "1e5"


def test_the_help_shows_a_recipe(home: Path) -> None:
    shown = CliRunner().invoke(app, ["train", "--help"]).output.split("An example:")[1].split("╭")[0]
    Path("shown.yaml").write_text("\n".join(line.strip() for line in shown.splitlines()))
    assert Recipe.from_yaml("shown.yaml").plan == "sp=2"


def test_init_asks_again_for_what_does_not_fit(home: Path) -> None:
    answers = ["model", "chats.jsonl", "many", "512", "0", "4", "sp=3", "sp=2", "", ""]
    result = CliRunner().invoke(app, ["init", "made.yaml"], input="\n".join(answers) + "\n")
    assert result.exit_code == 0 and "must divide the number of ranks (4)" in result.output
    recipe = Recipe.from_yaml("made.yaml")
    assert (recipe.plan, recipe.processes, recipe.data.max_tokens) == ("sp=2", 4, 512)


def test_init_writes_a_recipe_that_is_read(home: Path, tiny_checkpoint: Path) -> None:
    answers = [str(tiny_checkpoint), "chats.jsonl", "32768", "4", "", "", ""]
    result = CliRunner().invoke(app, ["init", "made.yaml"], input="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.output
    recipe = Recipe.from_yaml("made.yaml")
    assert (recipe.plan, recipe.processes, recipe.data.max_tokens) == ("sp=2", 4, 32768)
    assert "LoraConfig" in recipe.script()


def test_a_script_for_images_leaves_the_encoder_out(home: Path, tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig().save_pretrained(tmp_path / "vlm")
    values = yaml.safe_load(Path("recipe.yaml").read_text()) | {"model": str(tmp_path / "vlm")}
    Path("vlm.yaml").write_text(yaml.safe_dump(values))
    script = Recipe.from_yaml("vlm.yaml").script()
    assert "AutoModelForImageTextToText" in script and "AutoProcessor" in script
    assert "exclude_modules='.*(vision|visual|audio|image).*'" in script
    compile(script, "train.py", "exec")
