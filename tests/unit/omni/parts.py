"""Small omni models with fixed weights, and rows for them.

Shapes: an image is 4 tokens of the vision encoder and 16 codes of the image decoder; an audio clip is 5 tokens of the
audio encoder and 2 codes a frame of the audio decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_veomni import OmniModel, build_omni_model

VISION_TOKEN, AUDIO_TOKEN, IMAGE_TOKEN, SOUND_TOKEN = 90, 91, 92, 93
NUM_CODES, VOCABULARY = 24, 97

TEXT = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
WHISPER = {
    "model_type": "whisper",
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "vocab_size": 20,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_mel_bins": 8,
    "max_source_positions": 5,
    "pad_token_id": 0,
}
VQ = {
    "model_type": "janus_vqgan",
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 8,
    "embed_dim": 4,
    "num_embeddings": NUM_CODES,
    "num_patches": 4,
}
MIMI = {
    "model_type": "mimi",
    "sampling_rate": 8000,
    "hidden_size": 16,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "upsample_groups": 16,
    "num_quantizers": 2,
    "num_semantic_quantizers": 1,
    "codebook_size": 16,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
}
DAC = {
    "model_type": "dac",
    "encoder_hidden_size": 8,
    "downsampling_ratios": [2, 4],
    "decoder_hidden_size": 32,
    "n_codebooks": 2,
    "codebook_size": 16,
    "codebook_dim": 4,
}


def speaking(codec: dict[str, Any] = MIMI, **changes: Any) -> dict[str, Any]:
    """The config of a model that makes audio of 5 frames."""
    decoder = {"config": codec, "token_id": SOUND_TOKEN, "frames": 5, **changes}
    return {"foundation": {"config": TEXT}, "decoders": {"audio": decoder}}


def settings(**changes: dict[str, Any]) -> dict[str, Any]:
    """The config of a model with all parts but the audio decoder; `changes` are options of the parts by modality."""
    return {
        "foundation": {"config": TEXT, **changes.get("foundation", {})},
        "encoders": {
            "vision": {"config": SIGLIP, "token_id": VISION_TOKEN, **changes.get("vision", {})},
            "audio": {"config": WHISPER, "token_id": AUDIO_TOKEN, **changes.get("audio", {})},
        },
        "decoders": {"image": {"config": VQ, "token_id": IMAGE_TOKEN, **changes.get("image", {})}},
    }


def build(config: dict[str, Any] | None = None, **changes: dict[str, Any]) -> OmniModel:
    torch.manual_seed(0)
    model = build_omni_model(settings(**changes) if config is None else config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # larger than an initialisation, so that no gradient is tiny
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("embed_sum"):  # Mimi's codebooks, all zeros at first
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model.train()


def text_row(*, rows: int = 2, length: int = 11) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids.clone()}


def mixed_row() -> dict[str, Tensor]:
    """One row: text, an image to see, text, an audio clip, text, an image to draw, text; text and codes are learnt."""
    generator = torch.Generator().manual_seed(3)

    def text(n: int) -> Tensor:
        return torch.randint(3, 90, (n,), generator=generator)

    def marks(token: int, n: int) -> Tensor:
        return torch.full((n,), token)

    parts = [text(3), marks(VISION_TOKEN, 4), text(2), marks(AUDIO_TOKEN, 5), text(4), marks(IMAGE_TOKEN, 16), text(3)]
    ids = torch.cat(parts)[None]
    labels = ids.masked_fill((ids == VISION_TOKEN) | (ids == AUDIO_TOKEN), -100)
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.randn(1, 3, 8, 8, generator=generator),
        "input_features": torch.randn(1, 8, 10, generator=generator),
        "image_codes": torch.randint(0, NUM_CODES, (1, 16), generator=generator),
    }
