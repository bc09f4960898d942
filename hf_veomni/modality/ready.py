"""What a vision tower computes from the grid of its items, made on the host, and its attention by boundaries of items.

    tower, pre-hook    positions, boundaries, windows, interpolation of all patches, from a grid that the host knows
      attention        one call of the varlen kernel for all frames (or one fused call a frame), not one split a layer

A stock tower asks the device for its grid again and again: for each of these tables, and in each layer for the lengths
by which it splits queries, keys and values. Towers of the families in `TOWERS` take the tables ready-made, and the
boundaries where their attention is of a flash kind (`tower_attention`). Numbers stay those of stock sdpa.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from hf_veomni import hf
from hf_veomni.families import TOWERS
from hf_veomni.host import forget, make, move, on_host
from hf_veomni.modality.ulysses_vit import cutting, mark_boundaries, register_tower_attention


class ReadyTower:
    """The hook on one tower; a bound method, so that a deep copy of the model has its own."""

    def __init__(self, tower: nn.Module) -> None:
        self.config: Any = tower.config
        self.parameters = list(inspect.signature(tower.forward).parameters)
        name = register_tower_attention()
        self.attentions = [m for m in tower.modules() if hf.uses_attention_interface(m)]
        config = copy.copy(self.config)  # of its attention modules alone: other models may share the tower's
        hf.set_attention_name(config, name)
        for module in self.attentions:
            module.config = config
        self.handle = tower.register_forward_pre_hook(self.enter, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off; attention as it was."""
        self.handle.remove()
        for module in self.attentions:
            module.config = self.config

    def enter(self, tower: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Add what the tower would compute from its grid."""
        inputs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        grid = inputs.get("grid_thw")
        if cutting() is not None or not isinstance(grid, Tensor) or "cu_seqlens" in inputs:
            return None
        return args, {**kwargs, **self._tables(tower, on_host(grid), grid.device)}

    def _tables(self, tower: nn.Module, grid: Tensor, device: torch.device) -> dict[str, Any]:
        made, edges = tower_tables(tower, self.config, grid)
        tables: dict[str, Any] = {name: move(table, device) for name, table in made.items()}
        for name, edge in edges.items():
            lengths = make(_lengths, edge)
            tables[name] = mark_boundaries(move(edge, device), lengths, device)
            tables["max_seqlen" if name == "cu_seqlens" else "max_window_seqlen"] = max(lengths)
        return tables


def _lengths(edges: Tensor) -> list[int]:
    return edges.diff().tolist()


def tower_tables(tower: Any, config: Any, grid: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a tower of `TOWERS` computes from the grid of its items, by the names under which it takes it, on the CPU.

    Args:
        config: the tower's own.
        grid: [n, 3] on the host.

    Returns:
        Tables of all patches, and the boundaries between which they attend to each other.
    """
    rules, merge = TOWERS[config.model_type], config.spatial_merge_size
    grid = forget(grid)
    tables: dict[str, Any] = {"position_ids": make(get_vision_position_ids, grid, merge)}
    edges: dict[str, Tensor] = {"cu_seqlens": make(get_vision_cu_seqlens, grid)}
    if rules.windows:
        size, patch = config.window_size, config.patch_size
        found = make(get_vision_window_index, grid, merge, size, patch)
        tables["window_index"], edges["cu_window_seqlens"] = found
    if rules.tables:
        found = make(
            get_vision_interpolation_indices_and_weights,
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        tables.update(zip(("interp_indices", "interp_weights"), found, strict=True))
    return tables, edges
