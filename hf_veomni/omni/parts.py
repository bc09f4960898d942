"""Parts of an omni model: what an encoder and a foundation have to offer, and stock encoders.

Shapes: N items of a modality, n tokens of an item, B rows, S tokens of a row, C width of the foundation.
Decoders are in `decoders`. The component map (encoders -> foundation -> decoders, and the names lm_encode, lm_head,
...) is that of VeOmni, arXiv 2508.02317, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from hf_veomni.errors import UnsupportedError


def zero_of(outputs: Tensor) -> Tensor:
    """Nothing, with a gradient of zeros to all that made `outputs`."""
    return (outputs * 0).sum()


class EncoderMixin:
    """An encoder of one modality: features in, embeddings of the foundation's width out."""

    def lm_encode(self, features: Tensor) -> Tensor:
        """[N, ...] as the modality's processor makes them -> embeddings [N, n, C], one for each placeholder."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lm_encode(features)`.")

    def count_tokens(self, features: Tensor) -> int | None:
        """Embeddings that `lm_encode` would give, without running it; None where only the encoder knows."""
        return None

    def dummy_features(self) -> Tensor:
        """The smallest item: what a row without the modality runs, so that every parameter gets a gradient."""
        raise NotImplementedError(f"{type(self).__name__} must implement `dummy_features()`.")

    def lm_dummy(self) -> Tensor:
        """A scalar zero that depends on all parameters of the encoder."""
        return zero_of(self.lm_encode(self.dummy_features()))


class FoundationMixin:
    """The causal LM in the middle. Stock ones are used as they are; a subclass with other positions overrides this."""

    def get_pos_id(self, input_ids: Tensor, attention_mask: Tensor | None = None, **features: object) -> Tensor:
        """Position ids [1, S] (or [B, S], or what the foundation takes) of full rows [B, S].

        The default counts tokens from 0, placeholders too, as a bare causal LM does.
        """
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]


class _Encoder(EncoderMixin, nn.Module):
    """A stock tower and a projector to the foundation's width."""

    def __init__(self, tower: Any, width: int, hidden_size: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.tower = tower
        if options["projector"] == "linear":
            self.projector: nn.Module = nn.Linear(width, hidden_size)
        else:
            layers = nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
            self.projector = nn.Sequential(*layers)
        self.frozen: bool = options["freeze"]

    def freeze(self) -> None:
        """Take the gradient off what the config freezes."""
        if self.frozen:
            self.tower.requires_grad_(False)

    def lm_encode(self, features: Tensor) -> Tensor:
        return self.projector(self.tower(features.to(self.tower.dtype)).last_hidden_state)


def _size(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    value = value[0] if isinstance(value, (list, tuple)) and len(set(value)) == 1 else value
    if not isinstance(value, int):
        raise UnsupportedError(
            f"A vision encoder of type '{config.model_type}' has `{name}` {value!r}, and one number is needed: use "
            "SigLIP, CLIP, ViT or another tower for square images of one size."
        )
    return value


class VisionEncoder(_Encoder):
    """Images [N, channels, size, size] through a vision model with `last_hidden_state` (SigLIP, CLIP, ViT)."""

    def __init__(self, config: Any, hidden_size: int, options: dict[str, Any]) -> None:
        for name in ("image_size", "patch_size"):
            _size(config, name)
        if hasattr(config, "vision_use_head"):
            config.vision_use_head = False  # SigLIP's pooled output, which nobody reads
        tower = AutoModel.from_config(config)
        super().__init__(tower, _size(config, "hidden_size"), hidden_size, options)
        # Tokens before the patches: a class token, registers.
        names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
        self.extra = len(names & {"class_embedding", "cls_token"}) + getattr(config, "num_register_tokens", 0)

    def count_tokens(self, features: Tensor) -> int:
        side = _size(self.tower.config, "image_size") // _size(self.tower.config, "patch_size")
        return features.shape[0] * (side * side + self.extra)

    def dummy_features(self) -> Tensor:
        size, channels = _size(self.tower.config, "image_size"), getattr(self.tower.config, "num_channels", 3)
        return torch.zeros(1, channels, size, size, device=self.tower.device)


class AudioEncoder(_Encoder):
    """Log-mel spectrograms [N, mel bins, frames] through the encoder of a Whisper model; two frames a feature.

    A token is the mean of `pool` neighbouring features: fewer tokens for the foundation.
    """

    def __init__(self, config: Any, hidden_size: int, options: dict[str, Any]) -> None:
        if config.model_type != "whisper":
            raise UnsupportedError(f"An audio encoder must be of type 'whisper', not '{config.model_type}'.")
        self.pool: int = options.get("pool", 1)
        if config.max_source_positions % self.pool:
            raise ValueError(
                f"`pool` ({self.pool}) must divide the {config.max_source_positions} features of an item "
                "(`max_source_positions` of the encoder's config)."
            )
        super().__init__(WhisperEncoder._from_config(config), config.d_model, hidden_size, options)

    def lm_encode(self, features: Tensor) -> Tensor:
        found = self.tower(features.to(self.tower.dtype)).last_hidden_state
        return self.projector(found.unflatten(1, (-1, self.pool)).mean(2))

    def freeze(self) -> None:
        super().freeze()
        self.tower.embed_positions.requires_grad_(False)  # sinusoids, as in stock Whisper

    def count_tokens(self, features: Tensor) -> int:
        return features.shape[0] * (self.tower.config.max_source_positions // self.pool)

    def dummy_features(self) -> Tensor:
        config = self.tower.config
        return torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions, device=self.tower.device)


__all__ = ["AudioEncoder", "EncoderMixin", "FoundationMixin", "VisionEncoder", "zero_of"]
