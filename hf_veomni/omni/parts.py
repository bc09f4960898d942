"""Parts of an omni model: what an encoder, a foundation and a decoder have to offer, and stock ones.

Shapes: N items of a modality, n tokens of an item, B rows, S tokens of a row, H width of the foundation.
The component map (encoders -> foundation -> decoders, and the names lm_encode, lm_head, ...) is that of VeOmni,
arXiv 2508.02317, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, JanusVQVAE, PreTrainedConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder


def _zero(outputs: Tensor) -> Tensor:
    """Nothing, with a gradient of zeros to all that made `outputs`."""
    return (outputs * 0).sum()


class EncoderMixin:
    """An encoder of one modality: features in, embeddings of the foundation's width out."""

    def lm_encode(self, features: Tensor) -> Tensor:
        """[N, ...] as the modality's processor makes them -> embeddings [N, n, H], one for each placeholder."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lm_encode(features)`.")

    def count_tokens(self, features: Tensor) -> int | None:
        """Embeddings that `lm_encode` would give, without running it; None where only the encoder knows."""
        return None

    def dummy_features(self) -> Tensor:
        """The smallest item: what a row without the modality runs, so that every parameter gets a gradient."""
        raise NotImplementedError(f"{type(self).__name__} must implement `dummy_features()`.")

    def lm_dummy(self) -> Tensor:
        """A scalar zero that depends on all parameters of the encoder."""
        return _zero(self.lm_encode(self.dummy_features()))


class FoundationMixin:
    """The causal LM in the middle. Stock ones are used as they are; a subclass with other positions overrides this."""

    def get_pos_id(self, input_ids: Tensor, attention_mask: Tensor | None = None, **features: Any) -> Tensor:
        """Position ids [1, S] (or [B, S], or what the foundation takes) of full rows [B, S].

        The default counts tokens from 0, placeholders too, as a bare causal LM does.
        """
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]


class DecoderMixin:
    """A decoder of one modality: the foundation's hidden states in, items of the modality out.

    Attributes:
        num_codes: codes of an item.
        embed: codes [...] -> embeddings [..., H]; a module.
    """

    num_codes: int
    embed: Any

    def lm_encode(self, features: Tensor) -> Tensor:
        """Items [N, ...] -> their codes [N, n]: the targets of training."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lm_encode(features)`.")

    def lm_head(self, hidden: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Hidden states [..., H] -> logits of the next code, and with `labels` [...] the mean loss (not shifted)."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lm_head(hidden, labels)`.")

    def lm_embed(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] -> embeddings [..., H] of the codes that they predict: the next input."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lm_embed(hidden)`.")

    def lm_generate(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, n, H] that predict the codes of N items -> the items."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lm_generate(hidden)`.")

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, n] -> items."""
        raise NotImplementedError(f"{type(self).__name__} must implement `decode(codes)`.")

    def lm_dummy(self) -> Tensor:
        """A scalar zero that depends on all trainable parameters of the decoder."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lm_dummy()`.")


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
        raise ValueError(
            f"A vision encoder of type '{config.model_type}' has `{name}` {value!r}, and one number is needed: use "
            "SigLIP, CLIP, ViT or another tower for square pictures of one size."
        )
    return value


class VisionEncoder(_Encoder):
    """Pictures [N, channels, size, size] through a vision model with `last_hidden_state` (SigLIP, CLIP, ViT)."""

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
    """Log-mel spectrograms [N, mel bins, frames] through the encoder of a Whisper model; two frames a token."""

    def __init__(self, config: Any, hidden_size: int, options: dict[str, Any]) -> None:
        if config.model_type != "whisper":
            raise ValueError(f"An audio encoder must be of type 'whisper', not '{config.model_type}'.")
        super().__init__(WhisperEncoder._from_config(config), config.d_model, hidden_size, options)

    def freeze(self) -> None:
        super().freeze()
        self.tower.embed_positions.requires_grad_(False)  # sinusoids, as in stock Whisper

    def count_tokens(self, features: Tensor) -> int:
        return features.shape[0] * self.tower.config.max_source_positions

    def dummy_features(self) -> Tensor:
        config = self.tower.config
        return torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions, device=self.tower.device)


class ImageDecoder(DecoderMixin, nn.Module):
    """Pictures as codes of Janus's VQ model, predicted by a head of their own.

    The VQ model is never trained. It turns pictures into codes before training and codes into pictures after
    generation, and takes no part in the forward.
    """

    def __init__(self, config: Any, hidden_size: int, options: dict[str, Any]) -> None:
        super().__init__()
        if config.model_type != "janus_vqgan":
            raise ValueError(f"An image decoder must be of type 'janus_vqgan', not '{config.model_type}'.")
        self.vq: Any = JanusVQVAE._from_config(config)
        self.embed = nn.Embedding(config.num_embeddings, hidden_size)
        self.head = nn.Linear(hidden_size, config.num_embeddings, bias=False)
        self.num_codes = config.num_patches**2
        # Each level but the last halves the picture.
        self.size = config.num_patches * 2 ** (len(config.channel_multiplier) - 1)
        self.frozen: bool = options["freeze"]

    def freeze(self) -> None:
        """Take the gradient off the VQ model, and off the rest if the config freezes it."""
        (self if self.frozen else self.vq).requires_grad_(False)

    @torch.no_grad()
    def lm_encode(self, features: Tensor) -> Tensor:
        """Pictures [N, channels, size, size] -> codes [N, n], row by row.

        Raises:
            ValueError: pictures of another size than the VQ model's.
        """
        if features.dim() != 4 or features.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"Pictures of shape {tuple(features.shape)} must be [N, channels, {self.size}, {self.size}]: "
                f"{self.num_codes} codes a picture. Resize them, or set `num_patches` of the VQ model."
            )
        return self.vq.encode(features.to(self.vq.dtype)).image_tokens.view(len(features), -1)

    def lm_head(self, hidden: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.head(hidden)
        if labels is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100)

    def lm_embed(self, hidden: Tensor) -> Tensor:
        return self.embed(self.head(hidden).argmax(-1))

    def lm_generate(self, hidden: Tensor) -> Tensor:
        return self.decode(self.head(hidden).argmax(-1))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, n] -> pictures [N, channels, size, size].

        Raises:
            ValueError: another number of codes than a picture has.
        """
        if codes.dim() != 2 or codes.shape[1] != self.num_codes:
            raise ValueError(f"Codes of shape {tuple(codes.shape)} must be [N, {self.num_codes}], one row a picture.")
        return self.vq.decode(codes)

    def lm_dummy(self) -> Tensor:
        return _zero(self.head(self.embed.weight[:1]))


__all__ = ["AudioEncoder", "DecoderMixin", "EncoderMixin", "FoundationMixin", "ImageDecoder", "VisionEncoder"]
