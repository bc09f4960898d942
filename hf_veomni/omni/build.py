"""From a config to a model, with the weights of the checkpoints that it names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, JanusVQVAE

from hf_veomni.omni.config import OmniConfig
from hf_veomni.omni.model import OmniModel


def _load(where: str, checkpoint: str) -> dict[str, Any]:
    """State of the stock model that a part is made of."""
    if where == "foundation":
        return AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    if where == "decoders.image":
        return JanusVQVAE.from_pretrained(checkpoint).state_dict()
    model = AutoModel.from_pretrained(checkpoint)
    if where == "decoders.audio":
        return model.state_dict()
    if where == "encoders.audio":
        return model.get_encoder().state_dict()
    return getattr(model, "vision_model", model).state_dict()


def build_omni_model(
    config: OmniConfig | Mapping[str, Any] | str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> OmniModel:
    """Compose a model from an `OmniConfig`, a dict or a yaml file.

    Parts with a `checkpoint` get its weights, the others random ones; projectors, and the embedding and head of
    codes, are always new. A composed model that was saved is opened by `from_pretrained`.

    Args:
        dtype: of all parameters; None means fp32.

    Raises:
        ValueError: see `OmniConfig`; a checkpoint that lacks tensors of its part.
    """
    config = OmniConfig.parse(config)
    model = OmniModel._from_config(config, dtype=dtype or torch.float32)
    for where, checkpoint in config._checkpoints.items():
        part = model.get_submodule(where)
        module = part if where == "foundation" else getattr(part, "vq" if where.startswith("decoders") else "tower")
        missing, _ = module.load_state_dict(_load(where, checkpoint), strict=False)
        if missing:
            raise ValueError(f"Checkpoint '{checkpoint}' of `{where}` lacks {len(missing)} tensors: {missing[:3]}.")
    return model


__all__ = ["build_omni_model"]
