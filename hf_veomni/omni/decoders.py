"""Decoders of an omni model: items of a modality as codes, which a head of their own predicts.

Shapes: N items of a modality, n codes of an item, C width of the foundation, V codes there are; of audio clips Q
codebooks, T frames, n = T Q.
"""

from __future__ import annotations

import os
import wave
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, JanusVQVAE

from hf_veomni.errors import UnsupportedError


class DecoderMixin:
    """A decoder of one modality: the foundation's hidden states in, items of the modality out.

    Attributes:
        num_codes: codes of an item that is generated.
        embed: codes [...] -> embeddings [..., C]; a module.
    """

    num_codes: int
    embed: Any

    def lm_encode(self, features: Tensor) -> Tensor:
        """Items [N, ...] -> their codes [N, n]: the targets of training."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lm_encode(features)`.")

    def lm_head(self, hidden: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Hidden states [..., C] -> logits of the next code, and with `labels` [...] the mean loss (not shifted)."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lm_head(hidden, labels)`.")

    def allowed(self, place: int) -> Tensor | None:
        """[V] which codes may stand at a place of an item, counted from 0; None: all."""
        return None

    def lm_embed(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., C] -> embeddings [..., C] of the codes that they predict: the next input."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lm_embed(hidden)`.")

    def lm_generate(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, n, C] that predict the codes of N items -> the items."""
        raise NotImplementedError(f"{type(self).__name__} must implement `lm_generate(hidden)`.")

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, n] -> items."""
        raise NotImplementedError(f"{type(self).__name__} must implement `decode(codes)`.")


class _CodeDecoder(DecoderMixin, nn.Module):
    """Codes of a VQ model, with an embedding and a head of their own.

    The VQ model is never trained. It turns items into codes before training and codes into items after generation, and
    takes no part in the forward.
    """

    def __init__(self, vq: Any, size: int, hidden_size: int, options: dict[str, Any]) -> None:
        """`size`: V."""
        super().__init__()
        self.vq = vq
        self.embed = nn.Embedding(size, hidden_size)
        self.head = nn.Linear(hidden_size, size, bias=False)
        self.frozen: bool = options["freeze"]

    def freeze(self) -> None:
        """Take the gradient off the VQ model, and off the rest if the config freezes it."""
        (self if self.frozen else self.vq).requires_grad_(False)

    def lm_head(self, hidden: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.head(hidden)
        if labels is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100)

    def lm_embed(self, hidden: Tensor) -> Tensor:
        return self.embed(self.head(hidden).argmax(-1))

    def lm_generate(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        for place in range(hidden.shape[1]):
            if (allowed := self.allowed(place)) is not None:
                logits[:, place].masked_fill_(~allowed, float("-inf"))
        return self.decode(logits.argmax(-1))


class ImageDecoder(_CodeDecoder):
    """Images as codes of Janus's VQ model."""

    def __init__(self, config: Any, hidden_size: int, options: dict[str, Any]) -> None:
        if config.model_type != "janus_vqgan":
            raise UnsupportedError(f"An image decoder must be of type 'janus_vqgan', not '{config.model_type}'.")
        super().__init__(JanusVQVAE._from_config(config), config.num_embeddings, hidden_size, options)
        self.num_codes = config.num_patches**2
        # Each level but the last halves the image.
        self.size = config.num_patches * 2 ** (len(config.channel_multiplier) - 1)

    @torch.no_grad()
    def lm_encode(self, features: Tensor) -> Tensor:
        """Images [N, channels, size, size] -> codes [N, n], row by row.

        Raises:
            ValueError: images of another size than the VQ model's.
        """
        if features.dim() != 4 or features.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"Images of shape {tuple(features.shape)} must be [N, channels, {self.size}, {self.size}]: "
                f"{self.num_codes} codes an image. Resize them, or set `num_patches` of the VQ model."
            )
        return self.vq.encode(features.to(self.vq.dtype)).image_tokens.view(len(features), -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, n] -> images [N, channels, size, size].

        Raises:
            ValueError: another number of codes than an image has.
        """
        if codes.dim() != 2 or codes.shape[1] != self.num_codes:
            raise ValueError(f"Codes of shape {tuple(codes.shape)} must be [N, {self.num_codes}], one row an image.")
        return self.vq.decode(codes)


# Codec -> (codebooks, samples of a frame) by its config. DAC counts its codebooks under another name than Mimi.
_CODECS = {
    "mimi": lambda config: (config.num_quantizers, config.frame_size),
    "dac": lambda config: (config.n_codebooks, config.hop_length),
}


class AudioDecoder(_CodeDecoder):
    """Audio clips as codes of a Mimi or DAC codec: frame by frame, and in a frame one code of each codebook.

    A code of codebook k has the id k * codebook_size + code, so one embedding and one head serve all codebooks.
    """

    def __init__(self, config: Any, hidden_size: int, options: dict[str, Any]) -> None:
        if config.model_type not in _CODECS:
            raise UnsupportedError(f"An audio decoder must be of type 'mimi' or 'dac', not '{config.model_type}'.")
        self.num_codebooks, self.frame_size = _CODECS[config.model_type](config)
        self.codebook_size: int = config.codebook_size
        self.sampling_rate: int = config.sampling_rate
        super().__init__(AutoModel.from_config(config), self.num_codebooks * self.codebook_size, hidden_size, options)
        self.num_codes = options.get("frames", 25) * self.num_codebooks

    def allowed(self, place: int) -> Tensor:
        ids = torch.arange(self.embed.num_embeddings, device=self.vq.device)
        return ids // self.codebook_size == place % self.num_codebooks

    @torch.no_grad()
    def lm_encode(self, features: Tensor) -> Tensor:
        """Audio clips [N, samples] or [N, 1, samples] -> codes [N, n], frame by frame.

        Raises:
            ValueError: a shape of more than one channel.
        """
        clips = features[:, None] if features.dim() == 2 else features
        if clips.dim() != 3 or clips.shape[1] != 1:
            raise ValueError(f"Audio clips of shape {tuple(features.shape)} must be [N, samples] or [N, 1, samples].")
        codes = self.vq.encode(clips.to(self.vq.dtype)).audio_codes  # [N, Q, T]
        first = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size
        return (codes + first[:, None]).transpose(1, 2).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, n] -> audio clips [N, samples].

        Raises:
            ValueError: a broken frame, or a code in the place of another codebook's.
        """
        if codes.dim() != 2 or codes.shape[1] % self.num_codebooks:
            raise ValueError(f"Codes of shape {tuple(codes.shape)} must be [N, frames * {self.num_codebooks}].")
        first = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size
        plain = codes.unflatten(1, (-1, self.num_codebooks)).transpose(1, 2) - first[:, None]
        if bool(((plain < 0) | (plain >= self.codebook_size)).any()):
            raise ValueError(f"Codes must take turns: place i holds a code of codebook i % {self.num_codebooks}.")
        return self.vq.decode(audio_codes=plain).audio_values.reshape(len(codes), -1)


def write_wav(path: str | os.PathLike[str], sound: Tensor, sampling_rate: int) -> None:
    """Samples [S] between -1 and 1 as a 16-bit wav file of one channel; what is beyond is clipped."""
    samples = (sound.detach().float().cpu().clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(os.fspath(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes(samples.numpy().tobytes())


__all__ = ["AudioDecoder", "DecoderMixin", "ImageDecoder", "write_wav"]
