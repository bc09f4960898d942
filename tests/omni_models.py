"""Tiny models of more families of vision and audio, and rows for them without a processor, of random pixels and audio.

A row is words (random ids) and items between them; every item is as many placeholders as the model has features of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    Glm4vForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMForConditionalGeneration,
    VoxtralForConditionalGeneration,
)

IMAGE, VIDEO, AUDIO, START, END = 90, 91, 92, 93, 94
_WORDS = 80
_TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}}
_INTERLEAVED = {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_interleaved": True}}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
    "window_size": 32,
    "fullatt_block_indexes": [1],
}
_QWEN_AUDIO = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "output_dim": 32,
    "n_window": 8,
    "max_source_positions": 100,
}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": AUDIO}
_ENDS = {"vision_start_token_id": START, "vision_end_token_id": END}
_OMNI_ENDS = {"audio_start_token_id": 95, "audio_end_token_id": 96, "position_id_per_seconds": 25}


@dataclass(frozen=True)
class Family:
    """`kind` and `options` make the model, `row(seed, items)` a row of B=1; `items` are those of the fullest row."""

    kind: type[PreTrainedModel]
    options: dict[str, Any]
    row: Callable[[int, Sequence[tuple]], dict[str, Tensor]]
    items: tuple[tuple, ...]


def _words(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(3, _WORDS, (count,), generator=generator).tolist()


def _finish(ids: list[int], columns: dict[str, Tensor]) -> dict[str, Tensor]:
    row = torch.tensor([ids])
    kinds = (row == IMAGE).long() + 2 * (row == VIDEO).long() + 3 * (row == AUDIO).long()
    labels = row.masked_fill(row >= _WORDS, -100)
    return {"input_ids": row, "labels": labels, "mm_token_type_ids": kinds, **columns}


def _qwen_row(seed: int, items: Sequence[tuple], per_frame: bool = False, audio: str = "") -> dict[str, Tensor]:
    """Items: ("image", h, w), ("video", t, h, w) in patches, ("audio", frames)."""
    generator = torch.Generator().manual_seed(seed)
    ids, found = _words(generator, 7), {"image": [], "video": [], "audio": []}
    for kind, *size in items:
        if kind == "audio":
            (length,) = size
            count = (length - 1) // 2 + 1
            count = (count - 2) // 2 + 1 if audio == "2.5" else _qwen3_tokens(length)
            ids += [95, *[AUDIO] * count, 96]
            found[kind].append(torch.randn(16, length, generator=generator))
        else:
            t, h, w = (1, *size) if kind == "image" else size
            token = IMAGE if kind == "image" else VIDEO
            frames = [[token] * (h * w // 4)] * t if per_frame else [[token] * (t * h * w // 4)]
            ids += [x for frame in frames for x in (START, *frame, END)]
            found[kind].append((torch.randn(t * h * w, 96, generator=generator), [t, h, w]))
        ids += _words(generator, 4)
    columns: dict[str, Tensor] = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if found[kind]:
            columns[name] = torch.cat([patches for patches, _ in found[kind]])
            columns[f"{kind}_grid_thw"] = torch.tensor([grid for _, grid in found[kind]])
    if found["video"] and audio:
        columns["video_second_per_grid"] = torch.ones(len(found["video"]))
    if sounds := found["audio"]:
        longest = max(sound.shape[1] for sound in sounds)
        columns["input_features"] = torch.stack(
            [torch.nn.functional.pad(sound, (0, longest - sound.shape[1])) for sound in sounds]
        )
        columns["feature_attention_mask"] = torch.stack(
            [(torch.arange(longest) < sound.shape[1]).long() for sound in sounds]
        )
    row = _finish(ids, columns)
    if audio:
        del row["mm_token_type_ids"]
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    return row


def _qwen3_tokens(length: int) -> int:
    """Of the audio encoder: three convolutions of stride 2 in each piece of 100 frames."""
    rest = length % 100
    for _ in range(3):
        rest = (rest - 1) // 2 + 1
    return rest + length // 100 * 13


def _square_row(tokens: int, size: int, nested: bool = False) -> Callable[..., dict[str, Tensor]]:
    """Rows of images of one size, [n, 3, size, size], or nested in rows, of `tokens` features each."""

    def row(seed: int, items: Sequence[tuple]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids, pixels = _words(generator, 7), []
        for _ in items:
            ids += [*[IMAGE] * tokens, *_words(generator, 4)]
            pixels.append(torch.randn(3, size, size, generator=generator))
        columns = {"pixel_values": torch.stack(pixels)[None] if nested else torch.stack(pixels)} if pixels else {}
        row = _finish(ids, columns)
        del row["mm_token_type_ids"]
        return row

    return row


def _onevision_row(seed: int, items: Sequence[tuple]) -> dict[str, Tensor]:
    """Images of 32 x 32 in one base patch and one fine one, 16 + 4 * 5 features; videos of some frames of 4 + 1."""
    generator = torch.Generator().manual_seed(seed)
    ids, pixels, videos = _words(generator, 7), [], []
    for kind, *size in items:
        if kind == "image":
            ids += [IMAGE] * (16 + 4 * 5)
            pixels.append(torch.randn(2, 3, 32, 32, generator=generator))
        else:
            ids += [VIDEO] * (size[0] * 4 + 1)
            videos.append(torch.randn(size[0], 3, 32, 32, generator=generator))
        ids += _words(generator, 4)
    columns = {}
    if pixels:
        columns = {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor([[32, 32]] * len(pixels))}
    if videos:
        columns["pixel_values_videos"] = torch.stack(videos)
    row = _finish(ids, columns)
    del row["mm_token_type_ids"]
    return row


def _voxtral_row(seed: int, items: Sequence[tuple]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, sounds = _words(generator, 7), []
    for _ in items:
        ids += [*[AUDIO] * 12, *_words(generator, 4)]
        sounds.append(torch.randn(16, 48, generator=generator))
    row = _finish(ids, {"input_features": torch.stack(sounds)} if sounds else {})
    del row["mm_token_type_ids"]
    return row


def _by_frame(seed: int, items: Sequence[tuple]) -> dict[str, Tensor]:
    return _qwen_row(seed, items, per_frame=True)


def _glm(seed: int, items: Sequence[tuple]) -> dict[str, Tensor]:
    """Tokens of images stand for videos too, so that a row has one kind of the two."""
    row = _by_frame(seed, items)
    return {**row, "input_ids": row["input_ids"].masked_fill(row["input_ids"] == VIDEO, IMAGE)}


def _omni_2_5(seed: int, items: Sequence[tuple]) -> dict[str, Tensor]:
    return _qwen_row(seed, items, audio="2.5")


def _omni_3(seed: int, items: Sequence[tuple]) -> dict[str, Tensor]:
    return _qwen_row(seed, items, audio="3")


_SIGHTS = (("image", 4, 6), ("video", 2, 4, 4), ("image", 2, 2), ("image", 8, 4))
_SIGHTS_AND_SOUNDS = (("audio", 40), *_SIGHTS[:2], ("audio", 24), ("image", 2, 2), ("audio", 31))
_PICTURES = (("image",), ("image",), ("image",))


def _options(text: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {"text_config": _TEXT | text, **_TOKENS, **parts}


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        Qwen2_5_VLForConditionalGeneration,
        _options(_MROPE, vision_config=_QWEN_VISION, **_ENDS),
        _qwen_row,
        _SIGHTS,
    ),
    "qwen3_vl": Family(
        Qwen3VLForConditionalGeneration,
        _options(_INTERLEAVED, vision_config=_QWEN_VISION, **_ENDS),
        _by_frame,
        _SIGHTS,
    ),
    "qwen3_vl_moe": Family(
        Qwen3VLMoeForConditionalGeneration,
        _options(_INTERLEAVED | _MOE, vision_config=_QWEN_VISION, **_ENDS),
        _by_frame,
        _SIGHTS,
    ),
    "qwen2_5_omni": Family(
        Qwen2_5OmniThinkerForConditionalGeneration,
        _options(_MROPE, vision_config=_QWEN_VISION, audio_config=_QWEN_AUDIO, **_ENDS, **_OMNI_ENDS),
        _omni_2_5,
        _SIGHTS_AND_SOUNDS,
    ),
    "qwen3_omni": Family(
        Qwen3OmniMoeThinkerForConditionalGeneration,
        _options(
            _INTERLEAVED | _MOE,
            vision_config=_QWEN_VISION,
            audio_config=_QWEN_AUDIO | {"n_window": 50, "n_window_infer": 200, "downsample_hidden_size": 8},
            **_ENDS,
            **_OMNI_ENDS,
        ),
        _omni_3,
        _SIGHTS_AND_SOUNDS,
    ),
    "glm4v": Family(
        Glm4vForConditionalGeneration,
        _options(
            {"rope_parameters": _MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}},
            vision_config=_QWEN_VISION | {"image_size": 32},
            image_start_token_id=START,
            image_end_token_id=END,
        ),
        _glm,
        (("image", 4, 6), ("image", 2, 2), ("image", 8, 4)),
    ),
    "internvl": Family(
        InternVLForConditionalGeneration,
        _options(
            {"model_type": "qwen2"},
            vision_config=_VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
            image_seq_length=4,
        ),
        _square_row(4, 32),
        _PICTURES,
    ),
    "smolvlm": Family(
        SmolVLMForConditionalGeneration,
        _options({"model_type": "llama"}, vision_config=_VISION | {"image_size": 32, "patch_size": 8}, scale_factor=2),
        _square_row(4, 32, nested=True),
        _PICTURES,
    ),
    "llava_onevision": Family(
        LlavaOnevisionForConditionalGeneration,
        _options(
            {"model_type": "qwen2"},
            vision_config=_VISION | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
            image_grid_pinpoints=[[32, 32]],
            image_token_index=IMAGE,
            video_token_index=VIDEO,
        ),
        _onevision_row,
        (("image",), ("video", 3), ("image",), ("video", 3), ("image",)),
    ),
    "voxtral": Family(
        VoxtralForConditionalGeneration,
        _options(
            {"model_type": "llama"},
            audio_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_mel_bins": 16,
                "max_source_positions": 24,
            },
        ),
        _voxtral_row,
        (("audio",), ("audio",), ("audio",)),
    ),
}


def build(family: str) -> PreTrainedModel:
    """A model with fixed weights in fp32, without dropout, in training mode."""
    found = FAMILIES[family]
    kind: Any = found.kind.config_class
    options = dict(found.options)
    names = {"text_config": options["text_config"]}
    if "model_type" in names["text_config"]:
        text = dict(names["text_config"])
        options["text_config"] = CONFIG_MAPPING[text.pop("model_type")](**text)
    config = kind(**options)
    torch.manual_seed(0)
    return found.kind._from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
