"""Speed of the collator on raw images and audio, from files to a packed sequence, with and without loader workers.

    python -m benchmarks collator [--samples 64] [--workers 0 1 2]

Images are crops of two photographs (JPEG), audio clips are spoken sentences (wav, eSpeak NG at its own rate, so
they are resampled too); both go through the stock processors of Qwen2.5-VL and Qwen2-Audio, made from parts. Time is
wall clock, since workers are processes: the load of the machine counts, and is written down. `lengths from headers` is
what packing does before anything is decoded. Checked: every setting makes the same rows, token by token and pixel by
pixel, and the lengths from headers are theirs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import wave
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2AudioConfig,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks._record import measure, quantiles, record
from hf_veomni import OmniDataCollatorWithPacking, pack_dataset

PICTURE, SOUND = "<|vision_start|><|image_pad|><|vision_end|>", "<|audio_bos|><|AUDIO|><|audio_eos|>"
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|audio_bos|>", "<|audio_eos|>"]
SENTENCE = "the quick brown fox jumps over the lazy dog while seven wizards brew a bitter potion".split()


class PictureProcessor(Qwen2_5_VLProcessor):
    """Without its video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    bytes_ = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=bytes_, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL, "<|AUDIO|>"]})
    return made


def pictures(folder: Path, count: int) -> list[dict[str, Any]]:
    """JPEG files of 56 to 427 pixels a side."""
    random, photographs = np.random.default_rng(0), load_sample_images().images
    samples = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        height, width = random.integers(56, 428, 2)
        top, left = random.integers(0, 428 - height), random.integers(0, 641 - width)
        path = folder / f"{index}.jpg"
        Image.fromarray(photograph[top : top + height, left : left + width]).save(path, quality=90)
        samples.append({"text": f"{PICTURE} What is shown here?", "images": [str(path)]})
    return samples


def sounds(folder: Path, count: int) -> list[dict[str, Any]]:
    """Spoken sentences of 1 to 16 words."""
    examples = str(Path(__file__).parent.parent / "examples")
    sys.path += [] if examples in sys.path else [examples]
    from spoken_words import Speaker  # pyright: ignore[reportMissingImports]

    random, speaker, samples = np.random.default_rng(0), Speaker(), []
    for index in range(count):
        words = " ".join(SENTENCE[: random.integers(1, len(SENTENCE) + 1)])
        spoken = speaker.speak(words)
        path = folder / f"{index}.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(speaker.rate)
            file.writeframes(spoken.tobytes())
        samples.append({"text": f"{SOUND} {words}", "audios": [str(path)]})
    return samples


def checksum(row: dict[str, torch.Tensor]) -> tuple[float, ...]:
    return tuple(float(value.double().sum()) for _, value in sorted(row.items()))


def speeds(
    what: str, samples: list[dict[str, Any]], processor: Any, config: Any, options: argparse.Namespace
) -> list[dict[str, Any]]:
    source = Dataset.from_list(samples)
    collator = OmniDataCollatorWithPacking(options.max_tokens, processor, model_config=config)
    packed = pack_dataset(source, options.max_tokens, processor=processor)
    tokens = sum(sum(lengths) for lengths in packed.with_format(None)["document_lengths"][:])
    common = {"corpus": what, "samples": len(samples), "tokens": tokens, "max_tokens": options.max_tokens}
    common |= {"rows": len(packed), "fill_ratio": round(tokens / (len(packed) * options.max_tokens), 4)}
    seconds = measure(lambda: pack_dataset(source, options.max_tokens, processor=processor), options.repeats)
    rows = [common | {"what": "lengths from headers, and packing"} | rates(seconds, len(samples), tokens)]
    expected = None
    for workers in options.workers:
        loader = DataLoader(
            packed, batch_size=1, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0
        )
        made = [(batch["input_ids"].shape[1], checksum(batch)) for batch in loader]
        assert [n for n, _ in made] == [sum(row["document_lengths"]) for row in packed], "lengths were wrong"
        expected = expected or made
        assert made == expected, f"{workers} workers make other rows"
        seconds = measure(lambda loader=loader: [None for _ in loader], options.repeats)
        rows.append(common | {"what": "decode, process, collate", "workers": workers})
        rows[-1] |= rates(seconds, len(samples), tokens)
    for row in rows:
        number, speed = row["samples_per_second"]["p50"], row["tokens_per_second"]["p50"]
        workers = row.get("workers", "-")
        print(f"{what:9} {row['what']:34} workers {workers!s:2} {number:9.1f} samples/s {speed:9.0f} tokens/s")
    return rows


def rates(seconds: list[float], samples: int, tokens: int) -> dict[str, Any]:
    return {
        "samples_per_second": quantiles([samples / second for second in seconds]),
        "tokens_per_second": quantiles([tokens / second for second in seconds]),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    text = tokenizer()
    seeing = PictureProcessor(Qwen2VLImageProcessorPil(), text)
    hearing = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), text)
    # Positions are computed from the config alone, whatever the number of layers.
    sees = Qwen2_5_VLConfig(text_config={"num_hidden_layers": 1}, image_token_id=seeing.image_token_id)
    hears = Qwen2AudioConfig(audio_token_index=hearing.audio_token_id)
    cases = {"pictures": (pictures, seeing, sees), "sounds": (sounds, hearing, hears)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what, (make, processor, config) in cases.items():
            place = Path(folder) / what
            place.mkdir()
            rows += speeds(what, make(place, options.samples), processor, config, options)
    record("collator", rows)


if __name__ == "__main__":
    main()
