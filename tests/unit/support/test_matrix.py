"""The committed matrix is that of the installed libraries, and its page is made from it."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from typer.testing import CliRunner

from hf_veomni.support import load_matrix, render_markdown

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.everyday
def test_matrix_is_of_the_installed_versions():
    versions = load_matrix().versions
    assert versions == {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}


@pytest.mark.everyday
def test_matrix_has_every_model_type():
    assert set(load_matrix().families) == set(CONFIG_MAPPING_NAMES)


def test_nothing_is_wrong():
    counts = load_matrix().counts()
    assert counts["wrong"] == 0
    assert counts["works"] >= 300


def test_every_refusal_has_a_reason():
    assert [f.model_type for f in load_matrix().families.values() if f.outcome != "works" and not f.reason] == []


def test_page_says_what_the_trainer_logs_where_the_sweep_has_looked():
    matrix = load_matrix()
    families = {name: replace(f, trainer="", stages={}) for name, f in matrix.families.items()}
    assert "trainer" not in render_markdown(replace(matrix, families=families))
    families["llama"] = replace(families["llama"], trainer="works")
    page = render_markdown(replace(matrix, families=families))
    assert "| model type | class | padded | packed | loss | trainer | in |\n|---|---|---|---|---|---|---|" in page
    assert "| llama | LlamaForCausalLM | yes | yes | model | yes | fp32 |" in page
    assert "| gpt2 | GPT2LMHeadModel | yes | yes | model | - |" in page


def test_page_says_in_how_many_stages_a_family_was_trained():
    matrix = load_matrix()
    families = {name: replace(f, stages={}) for name, f in matrix.families.items()}
    assert "| pp |" not in render_markdown(replace(matrix, families=families))
    families["llama"] = replace(families["llama"], stages={"2": "works", "4": "works"})
    families["bloom"] = replace(families["bloom"], stages={"2": "it cannot be cut"})
    page = render_markdown(replace(matrix, families=families))
    lines = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert lines["llama"].endswith("| 2, 4 |") and lines["bloom"].endswith("| refused |")
    assert lines["gpt2"].endswith("| - |") and "stages`; 1 in 2 and 1 in 4." in " ".join(page.split())


def test_at_least_thirty_families_train_in_two_stages_and_ten_in_four():
    stages = [family.stages for family in load_matrix().families.values()]
    assert not any(outcome.startswith("wrong") for each in stages for outcome in each.values())
    assert sum(each.get("2") == "works" for each in stages) >= 30
    assert sum(each.get("4") == "works" for each in stages) >= 10


def test_page_is_the_rendering_of_the_matrix():
    assert (DOCS / "support.md").read_text() == render_markdown(load_matrix())


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["support"], "works"),
        (["support", "--model", "bert"], "BertForMaskedLM"),
        (["support", "--model", "Qwen2.5-VL"], "Qwen2_5_VLForConditionalGeneration"),
        (["--version"], version("hf-veomni")),
        (["support", "--model", "hrm_text"], "has no shard points"),
        (["support", "--model", "glm_moe_dsa"], "'model.layers.*.self_attn': {'sp': 'gather'}"),
        (["support", "--model", "recurrent_gemma"], "'*.temporal_block': {'sp': 'gather'}"),
        (["env"], torch.__version__.split("+")[0]),
    ],
)
def test_command_prints(arguments, wanted):
    from hf_veomni.cli import app

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert wanted in result.output


def test_live_test_of_a_checkpoint(tmp_path):
    from hf_veomni.cli import app

    transformers.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(
        tmp_path / "one"
    )
    transformers.XLNetConfig(d_model=32, n_layer=2, n_head=2).save_pretrained(tmp_path / "other")
    assert "can be cut: 2 layers" in CliRunner().invoke(app, ["support", "--model", str(tmp_path / "one")]).output
    refused = CliRunner().invoke(app, ["support", "--model", str(tmp_path / "other")])
    assert refused.exit_code == 1
    assert "no list of layers" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("given", "nearest"), [("qwen3vl", "qwen3_vl"), ("Lama", "llama"), ("deepseek-v4x", "deepseek_v4")]
)
def test_a_mistyped_model_type_is_offered_the_nearest(monkeypatch, given, nearest):
    """Without a look at the network."""
    import transformers

    from hf_veomni.cli import app

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *args, **kwargs: pytest.fail("asked"))
    result = CliRunner().invoke(app, ["support", "--model", given], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert f"'{nearest}'" in result.output
