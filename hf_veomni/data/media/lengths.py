"""Tokens and cost of raw samples before anything is decoded: from text, and from the headers of images and audio.

The processor itself tells what a placeholder becomes: where it has a formula that two trials confirm, that is used,
else it is tried once on an empty item of each size that occurs. The expanded text is then tokenised as it will be, so
lengths are exact, not estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_veomni import hf
from hf_veomni.data.media.alignment import audio_rule
from hf_veomni.data.media.chat import RawReader, sampling_rate
from hf_veomni.data.media.decode import BrokenItemError, audio_samples, image_size, name_of
from hf_veomni.errors import UnsupportedError
from hf_veomni.families import AUDIO, TILES

# (modality of each item, patches of each, parts of each that do not attend to each other) -> cost of each
CostFunction = Callable[[list[str], list[int], list[int]], Any]
_TRIALS: Mapping[str, tuple[Any, Any]] = {"image": ((448, 672), (301, 215)), "audio": (8_000, 43_211)}
_THIN = 4  # pixels that an image processor may take for channels


@dataclass(frozen=True)
class Size:
    """What a sample weighs.

    Attributes:
        tokens: of the row, placeholders included.
        cost: in the unit of the cost function, or the tokens without one.
    """

    tokens: int
    cost: float


class SizeReader:
    """Measures raw samples.

    Args:
        processor: the model's processor, or a tokenizer.
        cost: of items and of text, for example `CostModel.from_config(config).costs`: called with the modality of
            each, its patches (tokens of the text) and segments. None: one a token.
        model_config: tells the patches of a tile where the processor does not; without it they count as tokens.
        further: columns of samples that the processor does not read.
    """

    def __init__(
        self,
        processor: Any,
        cost: CostFunction | None = None,
        model_config: Any = None,
        further: Sequence[str] = (),
    ) -> None:
        self.reader, self.processor, self.cost = RawReader(processor, further=further), processor, cost
        self.config = getattr(model_config, "thinker_config", None) or model_config
        self._repeats: dict[str, bool] = {}
        self._without_formula: set[str] = set()
        self._replacements: dict[tuple[str, Any, int], str] = {}

    def measure(self, where: str, sample: Mapping[str, Any]) -> Size:
        """Tokens and cost of one raw sample.

        Raises:
            BrokenItemError: a header that cannot be read, or a size that the processor refuses.
            ValueError: as `RawReader.prompt`.
        """
        prompt = self.reader.prompt(where, sample)
        modalities, patches, segments = ["text"], [0], [1]
        replacements: dict[str, list[str]] = {}
        for modality, values in prompt.items.items():
            for index, value in enumerate(values):
                name = name_of(value, f"{modality} {index} of {where}")
                text, count, parts = self._item(modality, value, name, alone=len(values) == 1)
                replacements.setdefault(modality, []).append(text)
                modalities.append(modality)
                patches.append(count)
                segments.append(parts)
        text = _expand(where, prompt.text, replacements, self.processor)
        options = self.reader.text_options(prompt)
        length = len(self.reader.tokenizer(text, verbose=False, **options)["input_ids"])
        if self.cost is None:
            return Size(length, float(length))
        patches[0] = length
        return Size(length, float(np.sum(self.cost(modalities, patches, segments))))

    def _item(self, modality: str, value: Any, name: str, alone: bool) -> tuple[str, int, int]:
        """The text that an item becomes, its patches, and its parts that do not see each other.

        Args:
            alone: whether it is the only one of its modality in the sample.
        """
        if modality == "image":
            size: Any = image_size(value, name)
        else:
            size = audio_samples(value, sampling_rate(self.processor), name)
        # LLaVA-OneVision tiles an image only where it is alone in its sample, of which its formula knows nothing.
        among = not alone and self._counts_pictures(modality)
        repeats = not among and self._is_repeated(modality)
        try:
            thin = modality == "image" and min(size) <= _THIN
            tokens, patches = (None, None) if among or thin else self._formula(modality, size)
            if repeats and tokens is not None:
                text = self._token(modality) * tokens
            else:
                text = self._tried(modality, size, 2 if among else 1)
        except Exception as error:  # what it takes elsewhere: this item is too thin, too short, ...
            raise BrokenItemError(
                f"{name}: {type(self.processor).__name__} refuses an {modality} of size {size}: {error}"
            ) from error
        if patches is None:
            patches = tokens or text.count(self._token(modality))
            if modality == "audio":
                known = AUDIO.get(self._model_type())
                patches *= 1 if known is None else known.patches
            return text, patches, 1
        if hasattr(getattr(self.processor, "image_processor", None), "merge_size"):
            return text, patches, 1
        vision: Any = getattr(self.config, "vision_config", None)
        if getattr(self.config, "model_type", "") in TILES and isinstance(getattr(vision, "patch_size", None), int):
            return text, patches * (vision.image_size // vision.patch_size) ** 2, patches
        return text, tokens or patches, patches

    def _model_type(self) -> str:
        """Of the model, or by the name of the processor: Qwen2AudioProcessor -> qwen2_audio."""
        known = getattr(self.config, "model_type", None)
        if known is not None:
            return known
        plain = type(self.processor).__name__.removesuffix("Processor").lower()
        return next((name for name in AUDIO if name.replace("_", "") == plain), "")

    def _formula(self, modality: str, size: Any) -> tuple[int | None, int | None]:
        """Tokens and patches of an item of a size by the processor's formula, None where it has none."""
        if modality in self._without_formula:
            return None, None
        counts = hf.count_multimodal_tokens(self.processor, modality, size)
        if counts is None and modality == "audio":
            rule = audio_rule(self._model_type())
            maker: Any = getattr(self.processor, "feature_extractor", None)
            if rule is None or not hasattr(maker, "hop_length"):
                return None, None
            frames = min(-(-size // maker.hop_length), getattr(maker, "nb_max_frames", size))
            return int(rule(frames)), None
        return counts or (None, None)

    def _is_repeated(self, modality: str) -> bool:
        """Whether a placeholder becomes itself, as often as the formula says."""
        if modality not in self._repeats:
            tried = [self._try(modality, trial) for trial in _TRIALS[modality]]
            try:
                told = [self._formula(modality, trial)[0] for trial in _TRIALS[modality]]
            except Exception:  # made for other parts than this processor has: LLaVA's reads a crop that SigLIP lacks
                self._without_formula.add(modality)
                told = [None]
            repeated = zip(told, tried, strict=False)
            self._repeats[modality] = all(n is not None and text == self._token(modality) * n for n, text in repeated)
        return self._repeats[modality]

    def _counts_pictures(self, modality: str) -> bool:
        maker = getattr(self.processor, "image_processor", None)
        return modality == "image" and "batch_num_images" in getattr(maker, "model_input_names", ())

    def _tried(self, modality: str, size: Any, count: int = 1) -> str:
        """The text that the first of `count` placeholders becomes, tried once for each size."""
        if (modality, size, count) not in self._replacements:
            self._replacements[modality, size, count] = self._try(modality, size, count)
        return self._replacements[modality, size, count]

    def _token(self, modality: str) -> str:
        token = getattr(self.processor, f"{modality}_token", None)
        if token is None:
            raise UnsupportedError(
                f"{type(self.processor).__name__} has no `{modality}_token`, so it takes no {modality}s."
            )
        return getattr(token, "content", token)

    def _try(self, modality: str, size: Any, count: int = 1) -> str:
        """What the processor makes of an empty item of a size, beside others of it."""
        inputs: dict[str, Any] = {}
        if modality == "image":
            from PIL import Image

            height, width = size
            inputs["images"] = [[Image.new("RGB", (width, height))] * count]  # as `open_image` makes them
        else:
            rate = sampling_rate(self.processor)
            inputs |= {"audio": [np.zeros(size, dtype=np.float32)], "sampling_rate": rate}
        text = self._token(modality) * count
        output = self.processor(text=[text], return_text_replacement_offsets=True, **inputs)
        replaced = output.get("text_replacement_offsets")
        if not replaced or len(replaced[0]) != count:
            raise UnsupportedError(
                f"{type(self.processor).__name__} does not tell what becomes of its placeholders, so lengths are not "
                "known before decoding: run it first (dataset.map) and pack its output."
            )
        return replaced[0][0]["replacement"]


def _expand(where: str, text: str, replacements: Mapping[str, list[str]], processor: object) -> str:
    for modality, texts in replacements.items():
        token = getattr(processor, f"{modality}_token")
        pieces = text.split(getattr(token, "content", token))
        if len(pieces) - 1 != len(texts):
            raise ValueError(
                f"{where}: {len(pieces) - 1} placeholders ({token}) for {len(texts)} {modality}s: each item needs one."
            )
        text = "".join(part for pair in zip(pieces, [*texts, ""], strict=True) for part in pair)
    return text
