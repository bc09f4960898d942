"""Tiny models of vision and audio, with the processors of tests/processors.py, and samples of images and audio."""

from __future__ import annotations

import wave
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests import processors

_TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}


def _tokens(tokenizer: Any, **names: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _qwen_tokens(tokenizer: Any) -> dict[str, int]:
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    ends = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return _tokens(tokenizer, **{f"{name}_token_id": token for name, token in names.items()}, **ends)


def qwen2_5_vl() -> tuple[type[PreTrainedModel], Any, Any]:
    processor = processors.qwen_vl()
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "window_size": 32, "fullatt_block_indexes": [1]}
    text = _TEXT | {"rope_parameters": _MROPE}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_tokens(processor.tokenizer))
    return Qwen2_5_VLForConditionalGeneration, config, processor


def qwen3_vl() -> tuple[type[PreTrainedModel], Any, Any]:
    processor = processors.qwen_vl()
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    text = _TEXT | {"rope_parameters": _MROPE | {"mrope_interleaved": True}, "head_dim": 8}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_tokens(processor.tokenizer))
    return Qwen3VLForConditionalGeneration, config, processor


def qwen2_audio() -> tuple[type[PreTrainedModel], Any, Any]:
    processor = processors.qwen_audio()
    audio = {"num_mel_bins": 80, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4}
    audio |= {"encoder_ffn_dim": 48, "max_source_positions": 100}
    text = _TEXT | {"model_type": "qwen2"}
    index = _tokens(processor.tokenizer, audio_token_index="<|AUDIO|>")
    config = Qwen2AudioConfig(text_config=text, audio_config=audio, **index)
    return Qwen2AudioForConditionalGeneration, config, processor


def idefics3() -> tuple[type[PreTrainedModel], Any, Any]:
    processor = processors.idefics()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    text = _TEXT | {"model_type": "llama"}
    tokens = _tokens(processor.tokenizer, image_token_id="<image>")
    config = Idefics3Config(text_config=text, vision_config=vision, scale_factor=2, **tokens)
    return Idefics3ForConditionalGeneration, config, processor


def gemma3() -> tuple[type[PreTrainedModel], Any, Any]:
    processor = processors.gemma3()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    text = _TEXT | {"head_dim": 8, "sliding_window": 16}
    tokens = _tokens(processor.tokenizer, image_token_index="<image_soft_token>", boi_token_index="<start_of_image>")
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    return Gemma3ForConditionalGeneration, config, processor


FAMILIES = {
    "qwen2_5_vl": (qwen2_5_vl, processors.PICTURE),
    "qwen3_vl": (qwen3_vl, processors.PICTURE),
    "qwen2_audio": (qwen2_audio, processors.SOUND),
    "idefics3": (idefics3, "<image>"),
    "gemma3": (gemma3, "<start_of_image>"),
}


def build(family: str, **options: Any) -> tuple[PreTrainedModel, Any]:
    """A model with fixed weights in fp32, in training mode, and its processor."""
    kind, config, processor = FAMILIES[family][0]()
    config.use_cache = False
    config.text_config.use_cache = False
    torch.manual_seed(0)
    model = kind._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.train(), processor


@lru_cache
def pictures() -> list[np.ndarray]:
    """Two scanned digits and pieces of two photographs, ragged: [height, width, 3] of bytes."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = [np.kron(digit * 15, np.ones((4, 4))) for digit in load_digits().images[:2]]
    digits = [np.repeat(digit[..., None], 3, axis=-1).astype(np.uint8) for digit in digits]
    first, second = load_sample_images().images
    return [digits[0], first[100:150, 200:290], digits[1], second[:70, 40:80]]


@lru_cache
def sounds() -> list[np.ndarray]:
    """Tones that glide, ragged, at 16 kHz: float32 [samples]."""
    made = []
    for seconds, low, high in ((0.3, 200, 900), (1.1, 700, 120), (0.55, 300, 310), (1.9, 100, 2000)):
        time = np.arange(int(16_000 * seconds)) / 16_000
        made.append((0.4 * np.sin(2 * np.pi * (low + (high - low) * time / seconds / 2) * time)).astype(np.float32))
    return made


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> str:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return str(path)


def samples_of(family: str) -> list[dict[str, Any]]:
    """Raw samples: one item, two items, text alone, one item at the very end."""
    mark = FAMILIES[family][1]
    column, items = ("audios", sounds()) if mark == processors.SOUND else ("images", pictures())
    return [
        {"text": f"Before {mark} and after it.", column: items[:1]},
        {"text": f"{mark} or {mark}?", column: items[1:3]},
        {"text": "Nothing to see or to hear here, only words."},
        {"text": f"At last: {mark}", column: items[3:]},
    ]
