"""Make the ranks start from the same parameters; where they cannot, all of them raise alike."""

from __future__ import annotations

import hashlib
import logging
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_veomni.comm.agree import name_ranks

logger = logging.getLogger(__name__)


def _gather(value: object) -> list[Any]:
    """`value` of every rank, in rank order. Collective over all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _kinds(values: list[str]) -> dict[str, list[int]]:
    """The distinct values and which ranks have them."""
    kinds: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        kinds.setdefault(value, []).append(rank)
    return kinds


def _say(kinds: dict[str, list[int]]) -> str:
    return "; ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in kinds.items())


def check_same_value(name: str, value: object) -> None:
    """Raise ValueError on every rank unless an argument has the same `repr` on all of them. An all-gather."""
    if not _alone() and len(kinds := _kinds(_gather(repr(value)))) > 1:
        raise ValueError(f"`{name}` differs between the ranks: {_say(kinds)}. Pass the same on every rank.")


def _fingerprint(tensor: Tensor) -> Tensor:
    """One int64 that changes when a bit changes, up to collisions: weighted sums over the raw words."""
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    if raw.numel() % 4 == 0:
        aligned = raw if raw.storage_offset() % 4 == 0 else raw.clone()
        raw = aligned.view(torch.int32)
    step = 1 << 20
    sums = [
        (part.long() * (torch.arange(part.numel(), device=raw.device) % 65521 + 1)).sum() for part in raw.split(step)
    ]
    weights = torch.arange(1, len(sums) + 1, device=raw.device)
    return (torch.stack(sums) * weights).sum() if sums else raw.new_zeros((), dtype=torch.long)


def _describe(model: nn.Module) -> dict[str, str]:
    """Everything that FSDP needs to be the same on all ranks, by the name of the parameter or buffer."""
    found = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        trained = ", trained" if tensor.requires_grad else ""
        found[name] = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{trained}"
    return found


def check_same_model(model: nn.Module) -> None:
    """Check that all ranks hold the same architecture: names, shapes, dtypes, and which parameters are trained.

    Collective: an all-gather of a digest; where digests differ, one of the descriptions.

    Raises:
        ValueError: on every rank alike, naming the first tensor that differs.
    """
    if _alone():
        return
    mine = _describe(model)
    digests = _gather(hashlib.sha256(repr(list(mine.items())).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyone: list[dict[str, str]] = _gather(mine)
    names = dict.fromkeys(chain.from_iterable(everyone))
    for name in names:
        kinds = _kinds([described.get(name, "missing") for described in everyone])
        if len(kinds) > 1:
            raise ValueError(
                f"The ranks hold different models: '{name}' is {_say(kinds)}. Build the same model, with the same "
                "dtype and the same frozen parameters, on every rank."
            )
    raise ValueError(
        "The ranks hold the same parameters in another order: build the model in the same way on every rank."
    )


@torch.no_grad()
def _broadcast(tensor: Tensor, device: torch.device) -> None:
    """Rank 0's values for all ranks, in place, by way of `device`."""
    full = tensor.detach().to(device).contiguous()
    dist.broadcast(full, src=0)
    if full.data_ptr() != tensor.data_ptr():
        tensor.copy_(full)


def synchronize_parameters(model: nn.Module, device: torch.device | str = "cpu") -> list[str]:
    """Give every rank rank 0's value of each parameter and buffer that differs between ranks.

    Without it FSDP would cut every rank's shard from its own copy, and a LoRA adapter initialised without a common
    seed would be a silent mixture.

    Args:
        device: of this rank, on which everything travels: NCCL takes nothing from the CPU, where the buffers of a
            model from accelerate's `init_empty_weights()` are.

    Returns:
        Names of the tensors that differed.

    Collectives: a small all-gather, two small all-reduces, and a broadcast of each tensor that differs, over all
    ranks.

    Raises:
        ValueError: on every rank, where the ranks hold different models.
    """
    if _alone():
        return []
    check_same_model(model)
    named = dict(chain(model.named_parameters(), model.named_buffers()))
    named = {name: tensor for name, tensor in named.items() if tensor.numel() and not tensor.is_meta}
    if not named:
        return []
    device = torch.device(device)
    prints = torch.stack([_fingerprint(tensor).to(device) for tensor in named.values()])
    low, high = prints.clone(), prints
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    different = [name for name, same in zip(named, (low == high).tolist(), strict=True) if not same]
    for name in different:
        _broadcast(named[name], device)
    if different and dist.get_rank() == 0:
        logger.warning(
            "Each rank has initialised %d tensors of the model for itself (the first is %s), as happens to adapters "
            "and new heads without a common seed. All ranks go on with rank 0's values, which is right; set_seed(...) "
            "before the model is built makes the run repeatable.",
            len(different),
            different[0],
        )
    return different
