"""Configs from whatever names one, and models of a config with their head, without weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)


def load_config(model: str | os.PathLike[str] | PreTrainedConfig) -> PreTrainedConfig:
    """The config of a Hub id, a folder or a file.

    Raises:
        ValueError: there is none.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model` ('{model}') has no config that transformers reads: give a Hub id, a folder with a config.json, "
            f"or the path of such a file. {error}"
        ) from error


def builder(config: PreTrainedConfig, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """A function that builds the model of a config, with a language head where the family has one."""
    known: tuple[tuple[Any, Any], ...] = (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    )
    auto: Any = next((auto for mapping, auto in known if type(config) in mapping), AutoModel)
    return lambda: auto.from_config(config, dtype=dtype)
