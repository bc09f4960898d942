r"""Teach a model to write spoken words: audio (wav) in, letters out.

    accelerate launch --config_file accelerate_configs/cpu_sp2.yaml examples/listen.py
    python examples/listen.py                                              # one process, the same numbers

Twenty words are spoken to wav files by many voices of eSpeak NG (see `spoken_words`); some voices are held out, so the
model must understand speakers that it has never heard. A small Whisper encoder and a small Llama, both with new
weights, are trained together: a second of audio is 50 features, the means of 5 neighbours are 10 tokens, and the word
is spelt byte by byte (ByT5's tokenizer, which needs no file). Into `--output_dir` go the wav files, `metrics.json` and
`listen.png`, spectrograms of held-out voices with what the model understands.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import ByT5Tokenizer, WhisperFeatureExtractor

from hf_veomni import build_omni_model
from omni_common import DIGITS, IGNORED, make_trainer, parse_arguments, save_metrics
from spoken_words import Speaker, read_wav, write_wav

WORDS = (*DIGITS, "yes", "no", "left", "right", "start", "stop", "open", "close", "music", "weather")
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland")
TRAIN_VOICES = ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3")
HELD_OUT_VOICES = ("m7", "f4", "klatt")
SPEEDS, PITCHES = (150, 190), (35, 65)
RATE, MELS, FEATURES, POOL = 16000, 40, 50, 5
PLACEHOLDER = "<extra_id_0>"


@dataclass
class ScriptArguments:
    voices: list[str] = field(default_factory=lambda: list(TRAIN_VOICES), metadata={"help": "Voices to learn from."})
    held_out: list[str] = field(default_factory=lambda: list(HELD_OUT_VOICES), metadata={"help": "Voices to test on."})


DEFAULTS = {
    "output_dir": "outputs/listen",
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "max_steps": 250,
    "learning_rate": 2e-3,
    "logging_steps": 25,
}

WHISPER = {
    "model_type": "whisper",
    "d_model": 128,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "num_mel_bins": MELS,
    "max_source_positions": FEATURES,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def record(folder: Path, voices: list[str], words: tuple[str, ...] = WORDS, *, first: bool) -> list[tuple[Path, str]]:
    """Speak the words with all voices, accents, speeds and pitches into wav files; (file, word).

    The first process speaks; the others only learn the names.
    """
    speaker = Speaker() if first else None
    found: list[tuple[Path, str]] = []
    folder.mkdir(parents=True, exist_ok=True)
    settings = [(a, v, s, p) for a in ACCENTS for v in voices for s in SPEEDS for p in PITCHES]
    for accent, voice, speed, pitch in tqdm(settings, desc=f"voices of {folder.name}", disable=not first):
        for word in words:
            path = folder / f"{word}-{accent}-{voice}-{speed}-{pitch}.wav"
            found.append((path, word))
            if speaker is not None:
                samples = speaker.speak(word, f"{accent}+{voice}", words_a_minute=speed, pitch=pitch)
                write_wav(path, samples, speaker.rate)
    return found


def encode(word: str, spectrogram: Tensor, tokenizer: Any) -> dict[str, Any]:
    """An audio clip and the letters of its word, which are learnt, with the end of the text."""
    marks = [tokenizer.convert_tokens_to_ids(PLACEHOLDER)] * (FEATURES // POOL)
    letters = tokenizer(word)["input_ids"]  # ends with </s>
    labels = [IGNORED] * len(marks) + letters
    return {"input_ids": marks + letters, "labels": labels, "input_features": spectrogram[None]}


def spectrograms(files: list[tuple[Path, str]]) -> Tensor:
    """Log-mel spectrograms [N, mel bands, frames] of one second, as Whisper's processor makes them."""
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1)
    sounds = [read_wav(path, RATE) for path, _ in files]
    return extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features


def hear(files: list[tuple[Path, str]], tokenizer: Any) -> list[dict[str, Any]]:
    """The audio clips and the letters of their words."""
    return [encode(word, heard, tokenizer) for (_, word), heard in zip(files, spectrograms(files), strict=True)]


def build(tokenizer: Any) -> Any:
    token = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    text = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    return build_omni_model(
        {
            "foundation": {"config": text},
            "encoders": {"audio": {"config": WHISPER, "token_id": token, "pool": POOL}},
        }
    )


def spell(model: Any, samples: list[dict[str, Any]], tokenizer: Any) -> list[str]:
    """What the model writes after each audio clip, by `generate`. All ranks call it."""
    model.eval()
    written: list[str] = []
    for begin in range(0, len(samples), 120):
        part = samples[begin : begin + 120]
        heard = torch.cat([sample["input_features"] for sample in part]).to(model.device)
        prompts = torch.tensor([sample["input_ids"][: FEATURES // POOL] for sample in part], device=model.device)
        mask = torch.ones_like(prompts)
        out = model.generate(prompts, attention_mask=mask, input_features=heard, max_new_tokens=9, do_sample=False)
        written += tokenizer.batch_decode(out[:, prompts.shape[1] :], skip_special_tokens=True)
    return written


def draw(samples: list[dict[str, Any]], words: list[str], written: list[str], path: Path) -> None:
    """Spectrograms of one held-out voice, one for each word, with what was understood."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(4, 5)
    for axis, sample, word, said in zip(axes.flatten(), samples, words, written, strict=False):
        axis.imshow(sample["input_features"][0].numpy(), origin="lower", aspect="auto")
        axis.set_title(said, color="tab:green" if said == word else "tab:red", fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=120)


def share(found: list[str], wanted: list[str]) -> float:
    return float(np.mean([one == other for one, other in zip(found, wanted, strict=True)]))


def main() -> None:
    script, args = parse_arguments(ScriptArguments, __doc__.split("\n")[0], **DEFAULTS)
    tokenizer = ByT5Tokenizer()
    folder, first = Path(args.output_dir) / "wav", args.process_index == 0
    with args.main_process_first(desc="speaking"):
        train = record(folder / "train", script.voices, first=first)
        held_out = record(folder / "held-out", script.held_out, first=first)
    samples = hear(train, tokenizer), hear(held_out, tokenizer)
    words = [word for _, word in held_out]
    trainer = make_trainer(build(tokenizer), args, *samples)
    before = share(spell(trainer.model, samples[1], tokenizer), words)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    written = spell(trainer.model, samples[1], tokenizer)
    after = share(written, words)
    if trainer.is_world_process_zero():
        right = [one == other for one, other in zip(written, words, strict=True)]
        of = {voice: [f"-{voice}-" in path.name for path, _ in held_out] for voice in script.held_out}
        by_voice = {voice: float(np.mean(np.array(right)[chosen])) for voice, chosen in of.items()}
        counts = {"train": len(train), "held_out": len(held_out)}
        metrics = {"before": before, "after": after, "by_voice": by_voice, "train_seconds": seconds, "sounds": counts}
        save_metrics(args, metrics)
        draw(samples[1], words, written, Path(args.output_dir) / "listen.png")
        print(
            f"\nwords of voices never heard, spelt right: {before:.1%} before, {after:.1%} after ({len(words)} clips)"
        )
        print(f"  by voice: {by_voice}; {seconds:.0f} s of training; chance is {1 / len(WORDS):.0%}")
        print(f"spectrograms, audio and figures: {args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
