"""What an item of a modality costs: attention quadratic in its patches, everything else linear. Pure arithmetic.

n items, P patches of an item: the tokens that its encoder's layers see, before any merging (grid t * h * w for a
vision tower, frames after the convolutions for an audio tower, tokens for text; a tower that pads audio to 30 s sees
1,500 frames whatever the length). D width, F width of the MLP, L layers, W patches of an attention window.

    cost = per_patch * P + sum over kinds of layers: per_pair * pairs(P, W)
    pairs = P * min(P, W), under a causal mask w * (P - w / 2) with w = min(P, W)
    trained layer, FLOPs: per_patch = 3 * 2 * (attention projections + MLP weights), per_pair = 3 * 4 * D

Left out, because they are linear and small beside the layers (some percent): patch embedding, merger, projector, head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_veomni.errors import UnsupportedError
from hf_veomni.families import GATED

MODALITIES = ("text", "image", "video", "audio")
# Passes through (weights, attention): the backward of a linear layer makes two products, for its input and for its
# weight; that of attention makes two for each of its two.
PASSES = {"frozen": (1, 1), "passed": (2, 3), "trained": (3, 3)}

_WIDTH = ("embed_dim", "d_model", "hidden_size")  # Qwen2-VL's hidden_size is its output: embed_dim comes first
_LAYERS = ("depth", "encoder_layers", "num_hidden_layers")
_HEADS = ("num_heads", "encoder_attention_heads", "num_attention_heads")
_MLP = ("encoder_ffn_dim", "intermediate_size")
_PLAIN_ACTIVATIONS = ("gelu_new", "gelu", "relu", "quick_gelu")  # text models with these have no gate


@dataclass(frozen=True)
class Coefficients:
    """Cost of the items of one modality, in FLOPs, seconds or any other unit that all modalities share.

    Attributes:
        per_patch: what grows with the patches.
        attention: for each kind of layer, (cost of a query-key pair in all layers of the kind, patches of its window
            or None where a patch sees its full segment).
        causal: whether a patch sees only those before it.
    """

    per_patch: float
    attention: tuple[tuple[float, float | None], ...] = ()
    causal: bool = False

    def __post_init__(self) -> None:
        for value in (self.per_patch, *(pair for pair, _ in self.attention)):
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"Coefficient {value!r} must be finite and not negative: measure or compute it anew.")
        for _, window in self.attention:
            if window is not None and not window > 0:
                raise ValueError(f"Window ({window!r}) must be above 0 patches, or None for full attention.")

    def costs(self, patches: ArrayLike, segments: ArrayLike = 1) -> np.ndarray:
        """Cost of each item, float64 [n].

        Args:
            patches: patches of each item, [n].
            segments: equal parts of each item that do not attend to each other, a number or [n]: the frames of a
                video (grid t), the tiles of an image.
        """
        patches, segments = np.asarray(patches, dtype=np.float64), np.asarray(segments, dtype=np.float64)
        if patches.ndim != 1 or not (np.isfinite(patches) & (patches >= 0)).all():
            raise ValueError(f"`patches` ({patches.tolist()}) must be one number for each item, finite, not negative.")
        if segments.shape not in ((), patches.shape) or not (segments >= 1).all():
            raise ValueError(
                f"`segments` ({segments.tolist()}) must be a number, or one for each of the {len(patches)} items, "
                "and at least 1: use 1 where all patches of an item attend to each other."
            )
        span = patches / segments
        total = self.per_patch * patches
        for per_pair, window in self.attention:
            seen = span if window is None else np.minimum(span, window)
            pairs = seen * (span - seen / 2) * segments if self.causal else seen * patches
            total = total + per_pair * pairs
        return total

    @classmethod
    def from_config(
        cls, config: object, modality: str, training: str = "trained", checkpointed: bool = False
    ) -> Coefficients:
        """FLOPs from the fields of a transformers config: of a tower, or of a causal language model.

        Args:
            config: for example `model.config.vision_config`.
            modality: "text" (causal), "image", "video" or "audio".
            training: "trained" (forward, backward), "passed" (weights frozen, gradients pass: adapters, a frozen
                language model above a trained projector) or "frozen" (forward only).
            checkpointed: whether the backward computes the forward once more.

        Raises:
            ValueError: a field that is needed has none of its known names; the config's name is in the message.

        Source: 2 FLOPs a weight and token, twice that backward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
        """
        if modality not in MODALITIES:
            raise ValueError(f"`modality` ({modality!r}) must be one of {', '.join(MODALITIES)}.")
        if training not in PASSES:
            raise ValueError(f"`training` ({training!r}) must be one of {', '.join(PASSES)}.")
        weights, attention = PASSES[training]
        again = int(checkpointed and training != "frozen")
        width, layers, heads = (_read(config, names, modality) for names in (_WIDTH, _LAYERS, _HEADS))
        head_dim = getattr(config, "head_dim", None) or width // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        projections = layers * 2 * width * head_dim * (heads + kv_heads)
        mlp = (3 if _is_gated(config, modality) else 2) * width * _mlp_width(config, width, layers, modality)
        per_pair = (attention + again) * 4 * heads * head_dim  # scores and values, 2 FLOPs a product each
        kinds = {
            "text": _text_windows,
            "audio": _audio_windows,
        }.get(modality, _vision_windows)(config, layers)
        return cls(
            per_patch=float((weights + again) * 2 * (projections + mlp)),
            attention=tuple((float(per_pair * number), window) for number, window in kinds if number),
            causal=modality == "text",
        )

    @classmethod
    def fit(cls, patches: ArrayLike, seconds: ArrayLike, segments: ArrayLike = 1) -> Coefficients:
        """Coefficients from measured items: least squares of the relative error of seconds on (P, P^2), none negative.

        Args:
            patches: patches of each measured item, [n], of at least two sizes.
            seconds: seconds of each, [n].
            segments: as in `costs`; pairs are P^2 / segments then.
        """
        patches, seconds = np.asarray(patches, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
        if patches.shape != seconds.shape or patches.ndim != 1 or len(np.unique(patches)) < 2:
            raise ValueError(
                f"`patches` {patches.tolist()} and `seconds` {seconds.tolist()} must be pairs of at least two "
                "different sizes: measure the smallest and the largest item at least."
            )
        if not (np.isfinite(seconds) & (seconds > 0) & (patches > 0)).all():
            raise ValueError(
                f"`seconds` {seconds.tolist()} and `patches` must be finite and above 0: drop the others."
            )
        columns = np.stack([patches, patches**2 / np.asarray(segments)], axis=1) / seconds[:, None]
        scale = columns.max(axis=0)  # patches^2 is large: keep the problem well conditioned
        found = np.linalg.lstsq(columns / scale, np.ones(len(seconds)), rcond=None)[0] / scale
        if (found < 0).any():  # two coefficients: the other one alone is the best that is not negative
            alone = columns.sum(axis=0) / (columns**2).sum(axis=0)
            found = np.where(found < 0, 0, alone)
        return cls(float(found[0]), ((float(found[1]), None),))


@dataclass(frozen=True)
class CostModel:
    """Coefficients by modality, all in one unit: FLOPs (`from_config`) or seconds (`Coefficients.fit` for each)."""

    coefficients: Mapping[str, Coefficients]

    def __post_init__(self) -> None:
        unknown = set(self.coefficients) - set(MODALITIES)
        if unknown or not self.coefficients:
            raise ValueError(
                f"Modalities {sorted(unknown)} must be some of {', '.join(MODALITIES)}, and at least one."
            )

    @classmethod
    def from_config(
        cls, config: object, training: str | Mapping[str, str] = "trained", checkpointed: bool = False
    ) -> CostModel:
        """FLOPs for every modality of a transformers config: its text, vision and audio parts, or a tower's own.

        Args:
            config: of an omni model (thinker parts are found), a tower, Whisper, or a causal language model.
            training: as in `Coefficients.from_config`, for all or by modality (others are "trained").
            checkpointed: as there.

        Raises:
            UnsupportedError: a part that cannot be read; the message names it.
        """
        parts = _parts(getattr(config, "thinker_config", None) or config)
        modes = {name: training if isinstance(training, str) else training.get(name, "trained") for name in parts}
        if not isinstance(training, str) and not set(training) <= set(parts):
            raise ValueError(
                f"`training` names {sorted(set(training) - set(parts))}, but {_name(config)} has {sorted(parts)}."
            )
        return cls(
            {name: Coefficients.from_config(part, name, modes[name], checkpointed) for name, part in parts.items()}
        )

    def costs(
        self, modality: str | Sequence[str], patches: ArrayLike, segments: ArrayLike | None = None
    ) -> np.ndarray:
        """Cost of each item, float64 [n].

        Args:
            modality: of all items, or of each, [n].
            patches: patches of each item, [n].
            segments: parts that do not attend to each other (`Coefficients.costs`); default 1. A video needs its
                number of frames, since the towers that transformers ships attend within a frame (1 if one does not).
        """
        patches = np.asarray(patches)
        names = np.full(len(patches), modality) if isinstance(modality, str) else np.asarray(modality, dtype=str)
        if names.shape != patches.shape:
            raise ValueError(
                f"`modality` {list(names.shape)} and `patches` {list(patches.shape)} must be equally many."
            )
        if segments is None and "video" in names:
            raise ValueError("`segments` is missing for video: give the frames of each item (grid t), 1 for others.")
        parts = np.broadcast_to(np.asarray(1 if segments is None else segments), patches.shape)
        total = np.zeros(len(patches))
        for name in dict.fromkeys(names.tolist()):
            if name not in self.coefficients:
                raise ValueError(f"No coefficients for modality {name!r}: this model has {sorted(self.coefficients)}.")
            here = names == name
            total[here] = self.coefficients[name].costs(patches[here], parts[here])
        return total


def _name(config: object) -> str:
    return f"{type(config).__name__} ({getattr(config, 'model_type', 'no model_type')})"


def _read(config: object, names: Sequence[str], modality: str) -> int:
    """The first of the names that the config has, as a positive number."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise UnsupportedError(
        f"{_name(config)} has none of {', '.join(names)} as a positive number, so the cost of its {modality} is "
        "unknown: measure some items and use Coefficients.fit."
    )


def _parts(config: object) -> dict[str, Any]:
    """The config of each modality's layers."""
    vision, audio = getattr(config, "vision_config", None), getattr(config, "audio_config", None)
    parts = {"text": getattr(config, "text_config", None), "image": vision, "video": vision, "audio": audio}
    parts = {name: part for name, part in parts.items() if part is not None}
    if not parts:
        if hasattr(config, "num_mel_bins"):
            parts = {"audio": config}
        elif hasattr(config, "patch_size"):
            parts = {"image": config, "video": config}
        elif hasattr(config, "vocab_size"):
            parts = {"text": config}
        else:
            raise UnsupportedError(
                f"{_name(config)} has no text_config, vision_config or audio_config, and is none of them (vocab_size, "
                "patch_size, num_mel_bins): give its parts to Coefficients.from_config, or measure, Coefficients.fit."
            )
    return parts


def _is_gated(config: object, modality: str) -> bool:
    """Whether the MLP has a gate, that is three matrices and not two."""
    names = ("hidden_act", "hidden_activation", "activation_function")
    activation = next((getattr(config, name) for name in names if getattr(config, name, None)), "gelu")
    if modality == "text":
        return activation not in _PLAIN_ACTIVATIONS
    return activation == "silu" or getattr(config, "model_type", None) in GATED


def _mlp_width(config: object, width: int, layers: int, modality: str) -> int:
    """F of all layers together, counting the experts that one token uses."""
    top_k = getattr(config, "num_experts_per_tok", None)
    if top_k:
        expert = getattr(config, "moe_intermediate_size", None) or _read(config, _MLP, modality)
        dense = len(getattr(config, "mlp_only_layers", None) or ())
        shared = getattr(config, "shared_expert_intermediate_size", None) or 0
        wide = _read(config, _MLP, modality) if dense else 0
        return (layers - dense) * (top_k * expert + shared) + dense * wide
    ratio = getattr(config, "mlp_ratio", None)
    if ratio and not any(getattr(config, name, None) for name in _MLP):
        return layers * int(ratio * width)
    return layers * _read(config, _MLP, modality)


def _text_windows(config: object, layers: int) -> list[tuple[int, float | None]]:
    """(layers, window) of the kinds of attention that `layer_types` names."""
    types = getattr(config, "layer_types", None) or ["full_attention"] * layers
    windows = {
        "full_attention": None,
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    unknown = sorted(set(types) - set(windows))
    if unknown:
        raise UnsupportedError(
            f"{_name(config)} has layers of type {', '.join(unknown)}, and only {', '.join(windows)} are known: "
            "measure some rows and use Coefficients.fit."
        )
    return [(types.count(kind), window) for kind, window in windows.items()]


def _vision_windows(config: object, layers: int) -> list[tuple[int, float | None]]:
    """(layers, window): Qwen2.5-VL's window is a square of `window_size` pixels, but in `fullatt_block_indexes`."""
    pixels, full = getattr(config, "window_size", None), getattr(config, "fullatt_block_indexes", None)
    if not pixels or full is None:
        return [(layers, None)]
    return [(len(full), None), (layers - len(full), float((pixels // _read(config, ("patch_size",), "image")) ** 2))]


def _audio_windows(config: object, layers: int) -> list[tuple[int, float | None]]:
    """(layers, window): chunks of 2 * n_window mel frames, after one (Qwen2.5-Omni) or three halvings (Qwen3-Omni)."""
    half = getattr(config, "n_window", None)
    if not half:
        return [(layers, None)]
    mel = getattr(config, "n_window_infer", None)
    if not mel:
        return [(layers, float(half))]
    return [(layers, float(-(-2 * half // 8) * (mel // (2 * half))))]
