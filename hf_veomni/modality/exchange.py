"""Features of items to the rank whose slice of the sequence has their tokens, and to no other.

    a tower's share     [rows of my items, width]
    all-to-all          each row goes to one rank: about rows * width / sp elements leave and arrive
    for the model       [rows of all items, width], zeros where the token is in another rank's slice

The model scatters all of them into embeddings of the full row, of which the first layer's hook keeps the slice: what
the zeros become is cut away. That is so in the families of `SCATTER`; in others every rank gets all rows (`towers`).

Shapes: S tokens of the row, S' = S padded to a multiple of sp, s = S'/sp tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.comm.all_to_all import all_to_all
from hf_veomni.context import current, enter, leave
from hf_veomni.families import SCATTER
from hf_veomni.host import on_host
from hf_veomni.mesh import ParallelState
from hf_veomni.modality.balance import Assignment


class IdsWatch:
    """Hooks around a prepared model that note its `input_ids`; bound methods, so that a deep copy has its own."""

    def __init__(self, model: nn.Module, parameters: list[str]) -> None:
        self.parameters = parameters
        self.handles = [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of the model: note its token ids, unless it generates with a cache."""
        inputs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        full = hf.uses_cache(inputs)
        enter(self, ids=None if full else inputs.get("input_ids"))

    def leave(self, model: nn.Module, args: tuple, output: object) -> None:
        """Forget them."""
        leave(self)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def find_ranks(config: object, modality: str | None, num_rows: int, state: ParallelState) -> np.ndarray | None:
    """The SP rank whose slice has the token of each feature row, int64 [num_rows]; None where all ranks need them.

    Args:
        config: of the module whose `get_*_features` was called.
        modality: "image", "video" or "audio"; of None all ranks need them.
        num_rows: features of all items of the call.
    """
    ids = current().ids
    names = (f"{modality}_token_id", f"{modality}_token_index")
    token = next((found for name in names if isinstance(found := getattr(config, name, None), int)), None)
    if ids is None or token is None or getattr(config, "model_type", None) not in SCATTER:
        return None
    columns = (on_host(ids) == token).nonzero()[:, 1].numpy()
    part = -(-ids.shape[1] // state.sp_size)
    return columns // part if len(columns) == num_rows else None  # else the model's own error names both counts


def exchange_rows(
    local: Tensor, sizes: list[int], assignment: Assignment, ranks: np.ndarray, state: ParallelState
) -> Tensor:
    """Features of the tokens in this rank's slice, in their places; zeros elsewhere.

    Args:
        local: features of this rank's items in their order, [rows of them, width].
        sizes: rows of every item.
        ranks: of each row, which rank needs it (`find_ranks`).

    Returns:
        [rows of all items, width].

    Collective: one all-to-all over the SP group; its backward is the reverse one, which brings each row's gradient to
    the rank that encoded it.
    """
    assert state.sp_group is not None
    owners = np.repeat(assignment.rank_of, sizes)  # of each row, who encoded it
    places = np.empty(len(owners), dtype=np.int64)  # of each row, where it lies at its owner
    for rank in range(state.sp_size):
        places[owners == rank] = np.arange(int((owners == rank).sum()))
    me, everyone = state.sp_rank, range(state.sp_size)
    send = [np.flatnonzero((owners == me) & (ranks == rank)) for rank in everyone]
    receive = [np.flatnonzero((owners == rank) & (ranks == me)) for rank in everyone]
    leaving = local[_move(places[np.concatenate(send)], local.device)]
    arrived = all_to_all(leaving, state.sp_group, [len(x) for x in send], [len(x) for x in receive])
    index = _move(np.concatenate(receive), local.device)
    return local.new_zeros(len(owners), *local.shape[1:]).index_copy(0, index, arrived)


def _move(index: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(index).to(device, non_blocking=True)


def watch_ids(model: nn.Module, parameters: list[str]) -> Callable[[], None]:
    """Note the `input_ids` of each call of a prepared model; a function that stops it."""
    return IdsWatch(model, parameters).remove
