"""What a family is fed: rows of odd length, padded and packed. Shapes: B rows; S tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.sweep.family import Rows

LENGTH, ENCODED = 23, 19
DOCUMENTS = (9, 4, 10)
# Families whose rows begin with a prefix that sees all of itself.
PREFIXES = {"paligemma"}
_LOWEST, _HIGHEST = 3, 79  # tokens without a meaning of their own


def _ids(rows: int, length: int, seed: int, vocabulary: int = _HIGHEST) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_LOWEST, min(_HIGHEST, vocabulary), (rows, length), generator=generator)


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return getattr(config.get_text_config(), "vocab_size", None) or _HIGHEST


def _labels(ids: Tensor, kind: str, seed: int = 5) -> Tensor:
    labels = ids.clone()
    if kind == "masked":
        labels = _ids(*ids.shape, seed=6, vocabulary=int(ids.max()))
    labels[torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = -100
    labels[:, -1] = ids[:, -1]  # no shard may lose the last
    return labels


def plain(model: nn.Module, kind: str, takes: Mapping[str, Any]) -> Rows:
    """Two rows of one length."""
    ids = _ids(2, LENGTH, 3, _vocabulary(model))
    inputs = {"input_ids": ids}
    if "decoder_input_ids" in takes:
        encoded = to_dtype(encoder_inputs(model, takes), next(model.parameters()).dtype)
        inputs = {**encoded, "decoder_input_ids": ids}
    if "labels" in takes and kind != "base":
        inputs["labels"] = _labels(ids, kind)
    if getattr(model.config, "model_type", "") in PREFIXES:
        inputs["token_type_ids"] = (torch.arange(LENGTH) >= LENGTH // 3).long().repeat(2, 1)
    return Rows(inputs, torch.ones(ids.shape, dtype=torch.bool))


def encoder_inputs(model: nn.Module, takes: Mapping[str, Any]) -> dict[str, Tensor]:
    if "input_ids" in takes:
        return {"input_ids": _ids(2, ENCODED, 4, _vocabulary(model))}
    config: Any = model.config
    generator = torch.Generator().manual_seed(4)
    if "input_features" in takes:
        encoder = getattr(config, "encoder_config", None) or getattr(config, "audio_config", None) or config
        mels = next(
            (getattr(encoder, n) for n in ("num_mel_bins", "input_feat_per_channel") if hasattr(encoder, n)), 80
        )
        if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):  # whisper
            return {"input_features": torch.randn(2, mels, 2 * config.max_source_positions, generator=generator)}
        return {"input_features": torch.randn(2, 40, mels, generator=generator)}
    if "pixel_values" in takes:
        encoder = getattr(config, "encoder", None) or getattr(config, "vision_config", None) or config
        size = getattr(encoder, "image_size", 32)
        size = size if isinstance(size, int) else size[0]
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    return {"input_values": torch.randn(2, 1600, generator=generator)}


def to_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def padded(model: nn.Module, kind: str, takes: Mapping[str, Any]) -> Rows | None:
    """Two rows, the second with padding on the right."""
    if "attention_mask" not in takes:
        return None
    rows = plain(model, kind, takes)
    if "decoder_input_ids" in takes:
        if "input_ids" not in takes:
            return None
        mask = torch.ones(2, ENCODED, dtype=torch.long)
        mask[1, -6:] = 0
        rows.inputs["input_ids"][1, -6:] = 0
        rows.inputs["attention_mask"] = mask
        return rows
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -6:] = 0
    rows.inputs["input_ids"][1, -6:] = 0
    rows.inputs["attention_mask"] = mask
    if "labels" in rows.inputs:
        rows.inputs["labels"][mask == 0] = -100
    return Rows(rows.inputs, mask.bool())


def packed(model: nn.Module, kind: str, takes: Mapping[str, Any]) -> Rows | None:
    """One row of several documents, told apart by their positions."""
    if "position_ids" not in takes or "decoder_input_ids" in takes:
        return None
    ids = _ids(1, sum(DOCUMENTS), 7, _vocabulary(model))
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    edges = [0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()]
    documents = list(zip(edges[:-1], edges[1:], strict=True))
    return Rows({"input_ids": ids, "position_ids": positions}, torch.ones(ids.shape, dtype=torch.bool), documents)


def with_pictures(model: nn.Module, rows: Rows) -> Rows:
    """The same rows with one image each, for models that take none without."""
    config: Any = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 32
    size = size if isinstance(size, int) else size[0]
    pixels = torch.randn(rows.real.shape[0], 3, size, size, generator=torch.Generator().manual_seed(8))
    return Rows({**rows.inputs, "pixel_values": pixels.to(next(model.parameters()).dtype)}, rows.real)
