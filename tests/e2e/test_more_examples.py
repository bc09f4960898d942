"""Preferences, labels and streams, by the scripts that a person would start from: two ranks train as one process."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

import embed
from classify import read_samples
from preference_pairs import pydoc_pairs, read_pairs
from stream_mix import read_sources
from tests.e2e.launching import ROOT, launch, python

OPTIONS = {
    "sft": ["--max_length", "64", "--learning_rate", "1e-2"],
    "dpo": ["--max_length", "64", "--learning_rate", "1e-2"],
    "reward": ["--max_length", "1024", "--learning_rate", "1e-2"],
    "classify": ["--max_tokens", "64", "--learning_rate", "1e-2"],
    "embed": ["--max_tokens", "32", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2"],
    "stream_mix": ["--max_tokens", "256", "--learning_rate", "1e-2"],
}


def _losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"'loss': '?([\d.e-]+)", text)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_train_as_one_process(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    script = str(ROOT / "examples" / f"{name}.py")
    options = ["--model", str(tiny_checkpoint), "--dtype", "float32", "--max_steps", "4", *OPTIONS[name]]
    _, two = launch("cpu_sp2.yaml", script, *options, "--output_dir", str(tmp_path / "two"))
    _, one = python(script, *options, "--use_cpu", "--output_dir", str(tmp_path / "one"))
    assert len(_losses(two)) == 4 and _losses(two) == pytest.approx(_losses(one), rel=1e-3)  # as they are printed
    card = (tmp_path / "two/README.md").read_text()
    assert "hf-veomni" in card and "- Plan: `sp=2`, 2 ranks" in card
    assert list((tmp_path / "two").glob("*.safetensors"))


def test_pairs_are_read_or_made(tmp_path: Path) -> None:
    train, test = read_pairs(None)
    assert len(test) == 8 and len(train) + 8 == len(pydoc_pairs()) > 60
    assert train[0]["chosen"] != train[0]["rejected"] and train[0]["prompt"][0]["role"] == "user"
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pydoc_pairs()[:10]))
    assert [len(part) for part in read_pairs(str(tmp_path / "pairs.jsonl"))] == [2, 8]
    with pytest.raises(ValueError, match="has 10 pairs, of which 10 are held out"):
        read_pairs(str(tmp_path / "pairs.jsonl"), held_out=10)
    with pytest.raises(ValueError, match="`data` .nowhere. is no file: give a jsonl"):
        read_pairs("nowhere")


@pytest.fixture
def sft() -> ModuleType:
    pytest.importorskip("trl", reason="needs the extra `trl`")
    return importlib.import_module("sft")


def test_chats_are_read_or_made(sft: ModuleType, tmp_path: Path) -> None:
    train, test = sft.read_chats(None)
    assert len(test) == 10 and len(train) > 60
    assert [message["role"] for message in train[0]["messages"]] == ["user", "assistant"]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(chat) for chat in [*train, *test]))
    assert sft.read_chats(str(tmp_path / "chats.jsonl"))[1][0] == train[0]
    (tmp_path / "texts.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"text": "x"}')
    with pytest.raises(ValueError, match="has no `messages` in line 2"):
        sft.read_chats(str(tmp_path / "texts.jsonl"))
    with pytest.raises(ValueError, match="`data` .nowhere. is no file: give a jsonl"):
        sft.read_chats("nowhere")


@pytest.mark.parametrize(
    "first", ["", "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHi<|im_end|>\n{% endif %}"]
)
def test_answers_are_marked_in_an_unchanged_text(sft: ModuleType, first: str, tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = first + tokenizer.chat_template
    chat = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    sft.mark_answers(tokenizer)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    found = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    answers = [i for i, marked in zip(found["input_ids"], found["assistant_masks"], strict=True) if marked]
    assert tokenizer.decode(answers) == "b<|im_end|>d<|im_end|>"


def test_a_template_that_nobody_can_mark_is_refused(sft: ModuleType, tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match="marks no answers, and neither TRL nor this script .*--chat_template_path"):
        sft.mark_answers(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template: give a template with"):
        sft.mark_answers(tokenizer)


def test_sources_are_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    streams, weights = read_sources(json.dumps({str(tmp_path / "*.txt"): 2}))
    assert list(weights.values()) == [2.0] and [row["text"] for row in next(iter(streams.values()))] == ["one", "two"]
    with pytest.raises(ValueError, match="must be json such as"):
        read_sources("a.txt")
    with pytest.raises(ValueError, match="its ending must be one of jsonl"):
        read_sources('{"a.bin": 1}')


def test_labels_are_numbered_or_refused(tmp_path: Path) -> None:
    samples, names = read_samples(None)
    assert len(names) == 4 and {sample["label"] for sample in samples} == {0, 1, 2, 3}
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "good"}')
    with pytest.raises(ValueError, match="has the labels .'good'.: two or more are needed"):
        read_samples(str(tmp_path / "a.jsonl"))


def test_queries_are_read_or_refused(tmp_path: Path) -> None:
    train, held_out = embed.read_pairs(None)
    assert len(held_out) == 64 and len(train) > 256
    assert {tuple(pair) for pair in train + held_out} == {("query", "passage")}
    (tmp_path / "a.jsonl").write_text('{"query": "x", "passage": "y"}\n' * 5)
    with pytest.raises(ValueError, match="has 5 pairs: 128 or more are needed"):
        embed.read_pairs(str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="`data` .nowhere. is no file: give a jsonl with `query` and `passage`"):
        embed.read_pairs("nowhere")


def test_an_embedding_is_the_mean_of_a_texts_tokens() -> None:
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    wanted = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)])
    torch.testing.assert_close(embed.embed(hidden, mask), wanted / wanted.norm(dim=-1, keepdim=True))
