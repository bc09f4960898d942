"""Whether the placeholder tokens of a sample are as many as the features that its encoders will put there.

A model that finds one feature too many or too few fails deep in its forward, or trains on shifted features. Here the
sample is named before the model runs, from shapes and sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from hf_veomni.data.modalities import AUDIO_MASKS, GRIDS, modality_of
from hf_veomni.families import AUDIO, TILE_PROCESSORS, TILES

MODALITIES = ("image", "video", "audio")
_PATCHES = {"image": "pixel_values", "video": "pixel_values_videos"}


def _qwen2_audio(frames: Any) -> Any:
    """Whisper's second convolution halves the mel frames, a pool of two halves them again."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def _qwen3_omni(frames: Any) -> Any:
    """Three convolutions halve each chunk of 100 mel frames to 13."""
    rest = frames % 100
    for _ in range(3):
        rest = (rest - 1) // 2 + 1
    return rest + frames // 100 * 13


_AUDIO_RULES: Mapping[str, Callable[[Any], Any]] = {"pooled": _qwen2_audio, "chunked": _qwen3_omni}


def audio_rule(model_type: str | None) -> Callable[[Any], Any] | None:
    """Tokens of an audio clip from its mel frames (sum of its mask); None where the model's are not known."""
    known = AUDIO.get(model_type or "")
    return None if known is None else _AUDIO_RULES[known.rule]


def tile_tokens(config: Any) -> int | None:
    """Tokens of an image or tile of a model; None where they are not known to be all alike."""
    known = TILES.get(getattr(config, "model_type", None) or "")
    if known is None:
        return None
    if known.tokens is not None:
        return int(getattr(config, known.tokens))
    size, patch = (
        value[0] if isinstance(value, list | tuple) else value
        for value in (config.vision_config.image_size, config.vision_config.patch_size)
    )
    patches = (size // patch) ** 2
    if known.over is not None:
        return patches // getattr(config, known.over) ** 2
    return int(patches * getattr(config, known.times or "") ** 2)


# The same of a processor, which has put so many placeholders: it tells lost tiles at least.
_OF_PROCESSORS = ("image_seq_length", "image_seq_len")


class Alignment:
    """Counts placeholders and features of samples.

    Args:
        config: of the model, or None.
        processor: or None. Without both nothing is known and nothing checked.

    Attributes:
        placeholders: token ids by modality.
    """

    def __init__(self, config: object, processor: object) -> None:
        config = getattr(config, "thinker_config", None) or config
        self.config, self.processor = config, processor
        self.placeholders = {name: ids for name in MODALITIES if (ids := _placeholder_ids(name, config, processor))}

    def check(self, where: str, input_ids: np.ndarray, items: Mapping[str, Tensor]) -> None:
        """Compare the placeholders of one sample [T] with its features.

        Raises:
            ValueError: other numbers; it names the sample, the modality and both counts.
        """
        held = {modality_of(name) for name in items}
        for modality in MODALITIES:
            ids = self.placeholders.get(modality)
            if ids is None:
                continue
            tokens = int(np.isin(input_ids, ids).sum())
            features = self._features(where, modality, items) if modality in held else 0
            if features is None and tokens:
                continue
            if features is None or tokens != features:
                raise ValueError(
                    f"{where}: {tokens} {modality} placeholder tokens ({', '.join(map(str, ids))}) in `input_ids` and "
                    + (f"{features} {modality} features" if features is not None else f"{modality} features")
                    + " in its other columns: make both with one call of the processor, cut no text after it "
                    "(truncation), and keep its options those of the model."
                )

    def _features(self, where: str, modality: str, items: Mapping[str, Tensor]) -> int | None:
        """Features that the encoder will make of a sample's items, or None if no rule is known."""
        grid = items.get(GRIDS.get(modality, ""))
        if grid is not None:
            patches = int(grid.prod(-1).sum())
            pixels = items.get(_PATCHES[modality])
            if pixels is not None and pixels.dim() == 2 and len(pixels) != patches:
                raise ValueError(
                    f"{where}: `{_PATCHES[modality]}` has {len(pixels)} {modality} patches and `{GRIDS[modality]}` "
                    f"describes {patches}: make both with one call of the processor."
                )
            merge = self._merge_size(modality)
            return None if merge is None else patches // merge**2
        if modality == "audio":
            rule = audio_rule(getattr(self.config, "model_type", None))
            mask = next((items[name] for name in AUDIO_MASKS if name in items), None)
            if rule is not None and mask is not None:
                return int(rule(mask.sum(-1).long()).sum())
        return self._fixed(modality, items)

    def _fixed(self, modality: str, items: Mapping[str, Tensor]) -> int | None:
        pixels = items.get("pixel_values") if modality == "image" else None
        if pixels is None:
            return None
        each = None
        if self.config is not None:
            each = tile_tokens(self.config)
        elif type(self.processor).__name__ in TILE_PROCESSORS:
            each = next(value for name in _OF_PROCESSORS if (value := getattr(self.processor, name, None)))
        mask = items.get("pixel_attention_mask")
        tiles = pixels.shape[1] if mask is not None and mask.dim() == 4 else len(pixels)
        return None if each is None else each * tiles

    def _merge_size(self, modality: str) -> int | None:
        """Patches of a side that become one token: the model's if known, which may differ from the processor's."""
        vision = getattr(self.config, "vision_config", None)
        own = getattr(vision, "spatial_merge_size", None)
        maker = getattr(self.processor, "image_processor" if modality == "image" else "video_processor", None)
        return own or getattr(maker, "merge_size", None)


def _placeholder_ids(modality: str, config: object, processor: object) -> tuple[int, ...]:
    """Ids of the tokens that features replace."""
    for owner in (config, processor):
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            token = getattr(owner, name, None)
            if isinstance(token, int) and token >= 0:
                return (token,)
    return ()
