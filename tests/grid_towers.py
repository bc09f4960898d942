"""Tiny vision towers, of every family that takes patches and a grid, and pixels for them."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_SIZES = {
    "depth": 2,
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
    "window_size": 32,
    "fullatt_block_indexes": [1],
}


def _find(model_type: str) -> tuple[type[PreTrainedModel], type[Any]]:
    """The class of the tower whose config has this `model_type`, and of the config."""
    family = model_type.removesuffix("_encoder").removesuffix("_vision")
    models = vars(importlib.import_module(f"transformers.models.{family}.modeling_{family}")).values()
    configs = vars(importlib.import_module(f"transformers.models.{family}.configuration_{family}")).values()
    config = next(x for x in configs if inspect.isclass(x) and getattr(x, "model_type", None) == model_type)
    for kind in models:
        if inspect.isclass(kind) and issubclass(kind, PreTrainedModel) and kind.config_class is config:
            if "grid_thw" in inspect.signature(inspect.unwrap(kind.forward)).parameters:
                return kind, config
    raise LookupError(model_type)


def build_tower(model_type: str) -> PreTrainedModel:
    """A tower with fixed random weights in fp32; biases and norms are random too."""
    kind, config = _find(model_type)
    known = inspect.signature(config.__init__).parameters
    torch.manual_seed(0)
    options = {name: size for name, size in _SIZES.items() if name in known}
    tower = kind._from_config(config(**options), dtype=torch.float32, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return tower


def make_pixels(tower: PreTrainedModel, grid: list[list[int]], seed: int = 2) -> tuple[Tensor, Tensor]:
    """Pixel values [P, D] and the grid as a tensor [n, 3]."""
    config: Any = tower.config
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    rows = torch.tensor(grid)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(rows.prod(-1).sum()), width, generator=generator), rows
