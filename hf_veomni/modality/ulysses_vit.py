"""Ulysses inside a vision tower, for items too large for one rank: its patches are cut over the SP ranks.

    tower, pre-hook    pixels [P, D] -> [p, D], with positions and tables of this rank's patches beside them
      block            every layer works on p patches
        attention      patches for heads, attention within frames or windows of all, heads for patches (`ulysses`)
      merger           p / m features, of complete merge units
    tower, post-hook   features to the ranks whose slices have their tokens, or to all (`exchange`)

The towers' own code runs unchanged: what they compute from the grid of all patches (boundaries, positions, windows,
interpolation) they also take ready-made, and their attention asks transformers' AttentionInterface with boundaries if
its name is that of a flash kind. Towers with windows reorder patches; here the pixels come in that order already, so
that their own reordering has nothing to do, and features go back to the order of the tokens when they are full.

What is moved: in each block 4 P D / sp elements of queries, keys, values and outputs leave a rank, and as many in the
backward; of the features as much as of shared items (`towers`). Memory of the layers is 1/sp of that of all patches.

Shapes: P patches of all items; p of this rank; m patches of a merge unit; U = P/m units, features before any padding.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import bidirectional_mask_function
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from hf_veomni import hf
from hf_veomni.attention.documents import Documents
from hf_veomni.attention.mask import MaskSpec
from hf_veomni.attention.varlen import varlen_attention
from hf_veomni.comm.gather import gather_shards
from hf_veomni.context import Encoding, current
from hf_veomni.errors import UnsupportedError
from hf_veomni.families import TOWERS
from hf_veomni.mesh import ParallelState
from hf_veomni.modality.balance import Assignment
from hf_veomni.modality.exchange import exchange_rows, find_ranks
from hf_veomni.sequence.ulysses import AttentionCall, ulysses_attention

# transformers hands boundaries to what has "flash" in its name, and cuts queries by them for all others.
TOWER_NAME = "omni_tower_flash"
_BOUNDARIES = "_omni_boundaries"


def cutting() -> Encoding | None:
    """The `get_*_features` method that runs with patches cut; None where the tower runs in full."""
    encoding = current().encoding
    return encoding if encoding is not None and encoding.cut else None


@dataclass(frozen=True)
class Boundaries:
    """What is between boundaries of the full sequence attends to itself; goes through the tower on their tensor."""

    spec: MaskSpec
    state: ParallelState | None  # None: this rank has all patches


@torch.compiler.disable  # the boundaries hang on a tensor
def tower_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of a vision tower under "omni_tower_flash": within boundaries, through Ulysses where patches are cut.

    Args:
        query: [1, H, p, D], or of all patches in a tower that runs in full; key and value alike.
        cu_seq_lens_q: int, of all patches.

    Collectives: two all-to-alls over the SP group where patches are cut, and as many in the backward.
    """
    found: Boundaries | None = getattr(cu_seq_lens_q, _BOUNDARIES, None)
    options = {"scaling": scaling, "dropout": dropout}
    if found is None:
        found = Boundaries(_make_spec(cu_seq_lens_q.diff().tolist(), query.device), None)
    state = found.state
    if state is None:
        return varlen_attention(module, query, key, value, found.spec, **options)
    assert state.sp_group is not None
    call = AttentionCall(varlen_attention, module, found.spec, query.shape[1], options)
    return ulysses_attention(call, query, key, value, state.sp_group), None


def _make_spec(lengths: list[int], device: torch.device) -> MaskSpec:
    lengths = [length for length in lengths if length]
    documents = Documents.from_lengths([lengths])
    return MaskSpec(1, sum(lengths), bidirectional_mask_function, documents=documents, device=device)


def mark_boundaries(edges: Tensor, lengths: list[int], device: torch.device) -> Tensor:
    """`edges` of all patches with the parts of these lengths, which the host knows, for `tower_attention`."""
    setattr(edges, _BOUNDARIES, Boundaries(_make_spec(lengths, device), None))
    return edges


def register_tower_attention() -> str:
    """Make "omni_tower_flash" a name that transformers knows. Idempotent."""
    AttentionInterface.register(TOWER_NAME, tower_attention)
    return TOWER_NAME


class PatchSlices:
    """Which patches each SP rank has: complete merge units, equally many, the last slices filled up. Pure.

    Attributes:
        order: of the units in the tower, int64 [U], where it is not theirs.
        part: units of a slice.
    """

    def __init__(self, num_patches: int, unit: int, sp_size: int, order: Tensor | None = None) -> None:
        self.unit, self.sp_size, self.order = unit, sp_size, order
        self.num_units = num_patches // unit
        self.part = -(-self.num_units // sp_size)
        self.counts = [min(self.part, max(0, self.num_units - rank * self.part)) for rank in range(sp_size)]

    @property
    def num_filled(self) -> int:
        """Patches of all slices."""
        return self.part * self.unit * self.sp_size

    def take(self, x: Tensor, rank: int) -> Tensor:
        """[P, ..] to the patches of a rank, [p, ..], zeros where there are no more."""
        first, count = rank * self.part, self.counts[rank]
        if self.order is None:
            rows = x[first * self.unit : (first + count) * self.unit]
        else:
            rows = x.unflatten(0, (-1, self.unit))[self.order[first : first + count].to(x.device)].flatten(0, 1)
        missing = (self.part - count) * self.unit
        return torch.cat([rows, rows.new_zeros(missing, *x.shape[1:])]) if missing else rows

    def restore(self, x: Tensor) -> Tensor:
        """[U, width] from the order of the tower to that of the tokens."""
        return x if self.order is None else x[self.order.argsort().to(x.device)]


class TowerCut:
    """Hooks that cut the patches of one tower; bound methods, so that a deep copy of the model has its own."""

    def __init__(self, tower: nn.Module, state: ParallelState) -> None:
        self.config: Any = tower.config
        self.state, self.rules = state, TOWERS[self.config.model_type]
        self.unit = int(self.config.spatial_merge_size) ** 2
        self.slices: PatchSlices | None = None
        self.lengths: list[int] = []
        self.parameters = list(inspect.signature(tower.forward).parameters)
        register_tower_attention()
        self.attentions = [m for m in tower.modules() if hf.uses_attention_interface(m)]
        config = copy.copy(self.config)  # of its attention modules alone: other models may share the tower's
        hf.set_attention_name(config, TOWER_NAME)
        for module in self.attentions:
            module.config = config
        self.handles: list[Any] = [
            tower.register_forward_pre_hook(self.enter, with_kwargs=True),
            tower.register_forward_hook(self.leave),
        ]
        if self.rules.counts:
            embeddings: Any = tower.embeddings
            self.handles.append(embeddings.register_forward_pre_hook(self.cut_lengths))

    def remove(self) -> None:
        """Take the hooks off; attention as it was."""
        for handle in self.handles:
            handle.remove()
        for module in self.attentions:
            module.config = self.config

    def enter(self, tower: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Cut the inputs of a call that a `get_*_features` method makes."""
        self.slices = None
        if cutting() is None:
            return None
        inputs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        pixels, grid = inputs.pop(self.parameters[0]), inputs["grid_thw"]
        self.slices = slices = self._prepare(tower, inputs, grid, pixels)
        return (slices.take(pixels, self.state.sp_rank),), inputs

    def _prepare(self, tower: nn.Module, inputs: dict[str, Any], grid: Tensor, pixels: Tensor) -> PatchSlices:
        """Put into `inputs` what the tower would compute from the grid: of this rank's patches; boundaries of all."""
        order = windows = None
        if self.rules.windows:
            config = self.config
            order, windows = get_vision_window_index(
                grid, config.spatial_merge_size, config.window_size, config.patch_size, kwargs=inputs
            )
        slices = PatchSlices(len(pixels), self.unit, self.state.sp_size, order)
        rank = self.state.sp_rank
        positions = get_vision_position_ids(grid, self.config.spatial_merge_size, kwargs=inputs)
        inputs["position_ids"] = slices.take(positions, rank)
        edges = get_vision_cu_seqlens(grid, kwargs=inputs)
        edges, inputs["max_seqlen"], self.lengths = self._bound(edges, slices, pixels.device)
        inputs["cu_seqlens"] = edges
        if windows is not None:
            inputs["cu_window_seqlens"], inputs["max_window_seqlen"], _ = self._bound(windows, slices, pixels.device)
            inputs["window_index"] = torch.arange(slices.part, device=grid.device)
        if self.rules.tables:
            self._interpolate(tower, inputs, grid, slices)
        return slices

    def _bound(self, edges: Tensor, slices: PatchSlices, device: torch.device) -> tuple[Tensor, int, list[int]]:
        """Boundaries with what fills the last slices as a part of its own; the longest part; lengths without it."""
        lengths = edges.diff().tolist()
        padding = slices.num_filled - sum(lengths)
        parts = [*lengths, padding] if padding else lengths
        bound = torch.tensor([0, *accumulate(parts)], dtype=edges.dtype, device=edges.device)
        setattr(bound, _BOUNDARIES, Boundaries(_make_spec(parts, device), self.state))
        return bound, max(parts), lengths

    def _interpolate(self, tower: Any, inputs: dict[str, Any], grid: Tensor, slices: PatchSlices) -> None:
        """Rows of the learned table that each of this rank's patches reads, and their weights."""
        found = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=self.config.spatial_merge_size,
            kwargs=inputs,
        )
        for name, full in zip(("interp_indices", "interp_weights"), found, strict=True):
            inputs[name] = slices.take(full, self.state.sp_rank)

    def cut_lengths(self, embeddings: nn.Module, args: tuple) -> tuple | None:
        """Patches of each image in this rank's slice, in place of those of all."""
        if self.slices is None:
            return None
        size = self.slices.part * self.unit
        first = self.state.sp_rank * size
        edges = accumulate(self.lengths, initial=0)
        here = [max(0, min(high, first + size) - max(low, first)) for low, high in pairwise(edges)]
        here[-1] += size - sum(here)
        return args[0], torch.tensor(here, device=args[1].device), *args[2:]

    def leave(self, tower: nn.Module, args: tuple, output: Any) -> Any:
        """Features of all patches, as the stock tower gives them, and nothing else."""
        slices, encoding = self.slices, cutting()
        self.slices = None
        if slices is None or encoding is None:
            return None
        ranks = find_ranks(encoding.config, encoding.modality, slices.num_units, self.state)
        found: dict[str, Any] = {"pooler_output": self._join(output.pooler_output, slices, ranks)}
        if output.get("deepstack_features") is not None:
            found["deepstack_features"] = [self._join(deep, slices, ranks) for deep in output.deepstack_features]
        return type(output)(**found)

    def _join(self, local: Tensor, slices: PatchSlices, ranks: Any) -> Tensor:
        """[U / sp, width] of each rank to [U, width]; with `ranks`, zeros for rows whose tokens are elsewhere."""
        state = self.state
        assert state.sp_group is not None
        if ranks is None:
            return slices.restore(gather_shards(local, state.sp_group, dim=0)[: slices.num_units])
        ranks = ranks if slices.order is None else ranks[slices.order.cpu().numpy()]
        owners = Assignment.from_ranks(range(state.sp_size), state.sp_size)
        local = local[: slices.counts[state.sp_rank]]
        return slices.restore(exchange_rows(local, slices.counts, owners, ranks, state))


def check_cut(tower: nn.Module, name: str, sp_size: int) -> None:
    """Whether the patches of a tower can be cut.

    Raises:
        UnsupportedError: a tower of another kind, or fewer heads than ranks.
    """
    config: Any = getattr(tower, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in TOWERS:
        raise UnsupportedError(
            f"The rule 'sp: ulysses' names `{name}` ({type(tower).__name__}, model type {kind!r}), whose patches "
            f"cannot be cut: it takes towers of the model types {', '.join(sorted(TOWERS))}. Use 'balance' (complete "
            "items, the default) or 'replicate' for this one."
        )
    heads = getattr(config, "num_heads", None) or config.num_attention_heads
    if heads < sp_size:
        raise UnsupportedError(
            f"The rule 'sp: ulysses' names `{name}`, whose {heads} attention heads `sp_size` ({sp_size}) must not "
            f"exceed: use sp_size={heads} or less, or 'sp: balance' for it."
        )
