"""Configs from whatever names one, and models of a config with their head, without weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from hf_veomni.errors import UnsupportedError


def load_config(model: str | os.PathLike[str] | PreTrainedConfig) -> PreTrainedConfig:
    """The config of a Hub id, a folder or a file.

    Raises:
        ValueError: there is none.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise ValueError(
            f"`model` ('{model}') has no config that transformers reads: give a Hub id, a folder with a config.json, "
            f"or the path of such a file. {error}"
        ) from error


def builder(config: PreTrainedConfig, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """A function that builds the model of a config, with a language head where the family has one.

    Raises:
        UnsupportedError: AutoModel makes no model of it. The function raises ValueError for a config of
            which transformers makes none.
    """
    known: tuple[tuple[Any, Any], ...] = (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
        (MODEL_MAPPING, AutoModel),
    )
    auto: Any = next((auto for mapping, auto in known if type(config) in mapping), None)
    if auto is None:
        raise UnsupportedError(
            f"`model` has a {type(config).__name__}, of which transformers' AutoModel makes no model: give the config "
            "of the part that is trained, or to a dry run a function that builds it."
        )

    def build() -> nn.Module:
        try:
            return auto.from_config(config, dtype=dtype)
        except (ArithmeticError, RuntimeError) as error:
            raise ValueError(
                f"`model` has a {type(config).__name__} of which transformers makes no model ({error}): correct its "
                "sizes, which must be above 0."
            ) from error

    return build
