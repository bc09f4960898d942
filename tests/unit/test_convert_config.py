"""VeOmni's files become recipes; what has no equivalent is an error."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hf_veomni import OmniTrainingArguments, ParallelPlan, UnsupportedError
from hf_veomni.cli import app
from hf_veomni.convert_config import _DEFAULTS, _MOVED, convert

FLAT = """
model: {model_path: Qwen/Qwen3-8B, attn_implementation: flash_attention_2}
data: {train_path: chats.jsonl, chat_template: chatml, max_seq_len: 16384, train_size: 80000000}
train:
  output_dir: out
  data_parallel_mode: fsdp2
  ulysses_parallel_size: 4
  rmpad_with_pos_ids: true
  lr: 1.0e-5
  lr_decay_style: cosine
  lr_warmup_ratio: 0.03
  num_train_epochs: 2
  micro_batch_size: 1
  global_batch_size: 32
  use_wandb: false
"""
NESTED = """
model:
  model_path: Qwen3-VL-30B-A3B-Instruct
  ops_implementation: {moe_implementation: eager, attn_implementation: flash_attention_2}
  lora_config:
    {rank: 16, alpha: 32, lora_modules: [q_proj, v_proj],
     target_parameters: [model.language_model.layers.*.mlp.experts.gate_up_proj]}
data: {train_path: chats.jsonl, data_type: conversation, max_seq_len: 4096}
train:
  accelerator: {ulysses_size: 2, ep_size: 8, fsdp_config: {fsdp_mode: fsdp2}}
  gradient_checkpointing: {enable_reentrant: false}
  freeze_vit: true
  optimizer: {lr: 1.0e-4}
  init_device: meta
  checkpoint: {output_dir: out, manager: dcp}
  wandb: {enable: true, project: mine, name: first}
"""


def test_a_flat_file() -> None:
    recipe = convert(yaml.safe_load(FLAT), processes=16)
    assert recipe["model"] == "Qwen/Qwen3-8B" and recipe["plan"] == "sp=4" and "lora" not in recipe
    assert recipe["data"] == {"path": "chats.jsonl", "max_tokens": 16384} and recipe["dtype"] == "float32"
    assert recipe["arguments"] == {
        "output_dir": "out",
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,  # 32 sequences, of which 16 / 4 data ranks read one each at once
        "bf16": True,
        "gradient_checkpointing": True,
        "report_to": "none",
        "save_strategy": "epoch",
    }


def test_saves_after_each_epoch_where_no_steps_are_given() -> None:
    arguments = convert(yaml.safe_load(f"{FLAT}  save_steps: 0\n"), processes=16)["arguments"]
    assert arguments["save_strategy"] == "epoch" and "save_steps" not in arguments
    arguments = convert(yaml.safe_load(f"{FLAT}  save_steps: 50\n"), processes=16)["arguments"]
    assert arguments["save_steps"] == 50 and "save_strategy" not in arguments


def test_steps_of_an_epoch_become_those_of_the_run() -> None:
    arguments = convert(yaml.safe_load(f"{FLAT}  max_steps: 10\n"), processes=16)["arguments"]
    assert arguments["num_train_epochs"] == 2 and arguments["max_steps"] == 20


def test_a_nested_file_with_adapters_and_experts() -> None:
    recipe = convert(yaml.safe_load(NESTED), processes=8)
    assert recipe["plan"] == "sp=2,ep=8" and ParallelPlan.from_string(recipe["plan"]).ep_size == 8
    assert recipe["lora"] == {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj"],
    }
    assert recipe["arguments"]["report_to"] == "wandb" and recipe["arguments"]["run_name"] == "first"


def test_all_arguments_that_are_written_exist() -> None:
    known = {field.name for field in fields(OmniTrainingArguments)}
    written = {place.removeprefix("arguments.") for place in _MOVED.values() if place.startswith("arguments.")}
    assert written | set(_DEFAULTS) | {"lr_scheduler_type", "gradient_accumulation_steps"} <= known


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"data": {"mm_configs": {"fps": 2.0}}}, UnsupportedError, r"`data.mm_configs.fps` \(2.0\) has no equivalent"),
        ({"train": {"accelerator": {"pp_size": 2}}}, UnsupportedError, r"pp_size` \(2\) .* which knows 1: use `sp`"),
        ({"train": {"optimizer": {"type": "muon"}}}, UnsupportedError, "'muon'.*hand another optimizer"),
        ({"train": {"freeze_vit": True}}, UnsupportedError, "full fine-tuning trains the encoder, too"),
        ({"train": {"lr_decay_style": "wsd"}}, UnsupportedError, "'wsd'.*use one of cosine, constant, linear"),
        ({"train": {"global_batch_size": 6}}, ValueError, r"\(6\) must be a multiple of the 4 sequences"),
        ({"train": {"optimizer": {"lr": 1.0}}}, ValueError, "both stand for `arguments.learning_rate`"),
        ({"train": {"expert_parallel_size": 3}}, ValueError, "`ep_size`"),
        ({"data": {"max_seq_len": None}}, ValueError, "`data.max_seq_len` is missing"),
    ],
)
def test_what_has_no_equivalent_is_named(change: dict, kind: type[Exception], match: str) -> None:
    values = yaml.safe_load(FLAT)
    for section, keys in change.items():
        values[section] |= keys
    with pytest.raises(kind, match=match):
        convert(values, processes=16)


def test_all_that_has_no_equivalent_is_named_at_once() -> None:
    values = yaml.safe_load(FLAT)
    values["data"]["mm_configs"] = {"fps": 2.0}
    values["train"] |= {"enable_fsdp_offload": True, "lr_decay_style": "wsd"}
    with pytest.raises(UnsupportedError) as caught:
        convert(values, processes=16)
    first, second, third = str(caught.value).splitlines()
    assert "mm_configs.fps" in first and "'wsd'" in second and "enable_fsdp_offload" in third


# Keys and values as in the files that VeOmni ships, configs/text/qwen3.yaml and qwen3_moe_lora.yaml.
SHIPPED = """
model: {model_path: Qwen3-8B-Base, ops_implementation: {attn_implementation: flash_attention_2}}
data:
  {train_path: chats.jsonl, data_type: conversation, chat_template: chatml, max_seq_len: 2048, train_size: 750000,
   text_keys: messages}
train:
  accelerator:
    ulysses_size: 1
    fsdp_config: {fsdp_mode: fsdp1, full_shard: true, offload: false}
    offload: {enable_activation: false}
  gradient_checkpointing: {enable: true}
  global_batch_size: 8
  micro_batch_size: 1
  bsz_warmup_ratio: 0.007
  dyn_bsz_buffer_size: 200
  optimizer: {type: adamw, lr: 1.0e-4, lr_decay_style: cosine, max_grad_norm: 1.0}
  num_train_epochs: 3
  enable_mixed_precision: true
  init_device: meta
  enable_full_determinism: false
  empty_cache_steps: 500
  checkpoint: {output_dir: out, manager: dcp, save_steps: 100, save_epochs: 1, save_hf_weights: true}
  wandb: {project: VeOmni, name: first}
"""


def test_files_that_veomni_ships() -> None:
    values = yaml.safe_load(SHIPPED)
    recipe = convert(values, processes=8)
    assert recipe["arguments"]["learning_rate"] == 1e-4 and recipe["arguments"]["save_steps"] == 100
    moved = {name: values["train"].pop(name) for name in ("optimizer", "accelerator")}
    moved["accelerator"] |= {name: values["train"].pop(name) for name in ("gradient_checkpointing", "init_device")}
    values["data"]["dyn_bsz_buffer_size"] = values["train"].pop("dyn_bsz_buffer_size")
    values["model"] |= moved
    assert convert(values, processes=8) == recipe  # the latest layout, where these belong to the model


def test_experts_that_are_named_as_modules_are_an_error() -> None:
    values = yaml.safe_load(NESTED)
    lora = {"rank": 8, "lora_modules": ["q_proj", "up_proj"], "share_expert_lora": False}
    values["model"]["lora_config"] = lora
    with pytest.raises(UnsupportedError, match=r"\(up_proj\) means the experts' parameters.*target_parameters"):
        convert(values, processes=8)
    lora |= {"lora_modules": ["q_proj"], "target_parameters": ["mlp.experts.up_proj"]}
    assert convert(values, processes=8)["lora"]["target_modules"] == ["q_proj"]


def test_the_command_writes_a_recipe_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_veomni.recipe import Recipe

    monkeypatch.chdir(tmp_path)
    Path("theirs.yaml").write_text(FLAT)
    Path("chats.jsonl").write_text("")
    command = ["convert-config", "theirs.yaml", "ours.yaml", "--processes", "16"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert Recipe.from_yaml("ours.yaml").arguments["gradient_accumulation_steps"] == 8
    again = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert again.exit_code == 2 and "give the name of a new file" in again.output
