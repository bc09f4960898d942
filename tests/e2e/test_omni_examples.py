"""The examples of composed models under `accelerate launch` at sp=2: some steps of each, and the real runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

import draw_digits
import listen
from spoken_words import Speaker, read_wav, write_wav
from tests.e2e.launching import launch, python

CONFIG = "cpu_sp2.yaml"


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def is_picture(path: Path) -> bool:
    return path.read_bytes()[:4] == b"\x89PNG"


def test_reading_runs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = ["--model", str(tiny_checkpoint), "--placeholder", "<|endoftext|>"]
    few = ["--limit", "12", "--max_steps", "2", "--per_device_train_batch_size", "6"]
    launch(CONFIG, "examples/read_digits.py", *model, *few, "--output_dir", str(tmp_path))
    found = metrics(tmp_path)
    assert found["after"]["eval_loss"] < found["before"]["eval_loss"]
    assert is_picture(tmp_path / "read.png")


@pytest.mark.slow
def test_drawing_runs(tmp_path: Path) -> None:
    few = ["--vq_steps", "2", "--limit", "64", "--max_steps", "2", "--drawings", "1"]
    launch(CONFIG, "examples/draw_digits.py", *few, "--output_dir", str(tmp_path))
    found = metrics(tmp_path)
    assert found["loss_after"] < found["loss_before"]
    assert is_picture(tmp_path / "draw.png")


@pytest.mark.slow
def test_listening_runs(tmp_path: Path) -> None:
    few = ["--voices", "m1", "--held_out", "f4", "--max_steps", "2"]
    launch(CONFIG, "examples/listen.py", *few, "--output_dir", str(tmp_path))
    found = metrics(tmp_path)
    assert found["sounds"] == {"train": 240, "held_out": 240}
    assert is_picture(tmp_path / "listen.png")
    assert len(list((tmp_path / "wav/train").glob("seven-*.wav"))) == 12


@pytest.mark.slow
def test_examples_learn_the_same_in_one_process(tmp_path: Path) -> None:
    few = ["--vq_steps", "2", "--limit", "64", "--max_steps", "4", "--drawings", "1"]
    launch(CONFIG, "examples/draw_digits.py", *few, "--output_dir", str(tmp_path / "two"))
    python("examples/draw_digits.py", *few, "--output_dir", str(tmp_path / "one"))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("loss_before", "loss_after", "vq_error"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_words_differ_by_voice_and_survive_the_file(tmp_path: Path) -> None:
    speaker = Speaker()
    one, other = speaker.speak("seven"), speaker.speak("seven", "en-us+f3", words_a_minute=120)
    assert len(one) > speaker.rate // 4 and abs(one).max() > 5000
    assert len(other) > 1.1 * len(one)
    write_wav(tmp_path / "a.wav", one, speaker.rate)
    assert abs(read_wav(tmp_path / "a.wav", speaker.rate) * 32768 - one).max() < 1
    half = read_wav(tmp_path / "a.wav", speaker.rate // 2)
    assert abs(len(half) - len(one) / 2) <= 1
    with pytest.raises(ValueError, match="has no voice 'xx-none'"):
        speaker.speak("seven", "xx-none")


def test_placeholders_stand_for_what_is_given() -> None:
    tokenizer = ByT5Tokenizer()
    drawn = draw_digits.encode(3, torch.arange(16), tokenizer)
    mark = tokenizer.convert_tokens_to_ids(draw_digits.PLACEHOLDER)
    assert drawn["input_ids"].count(mark) == 16 == len(drawn["labels"]) - drawn["labels"].count(-100)
    heard = listen.encode("stop", torch.zeros(listen.MELS, 2 * listen.FEATURES), tokenizer)
    assert heard["input_ids"].count(mark) == listen.FEATURES // listen.POOL
    assert tokenizer.decode([label for label in heard["labels"] if label != -100]) == "stop</s>"


@pytest.mark.slow
@pytest.mark.real_model
def test_real_reading_learns(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--model", str(smollm2_checkpoint), "--output_dir", str(tmp_path)]
    launch(CONFIG, "examples/read_digits.py", *options, limit=1500)
    found = metrics(tmp_path)
    assert found["before"]["eval_accuracy"] < 0.2 and found["by_kind"]["digits"] > 0.6


@pytest.mark.slow
def test_real_drawing_learns(tmp_path: Path) -> None:
    launch(CONFIG, "examples/draw_digits.py", "--output_dir", str(tmp_path), limit=1500)
    found = metrics(tmp_path)
    assert found["recognised"] > 0.6 and found["different"] > 80


@pytest.mark.slow
def test_real_listening_learns(tmp_path: Path) -> None:
    launch(CONFIG, "examples/listen.py", "--output_dir", str(tmp_path), limit=1500)
    found = metrics(tmp_path)
    assert found["before"] < 0.1 and found["after"] > 0.6
