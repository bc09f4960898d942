"""A dense MLP in tiles of tokens, one after the other: for sequences whose MLP needs more memory than all else.

    whole    x [B, s, C] ----------------------> [B, s, I] ... -> [B, s, C]
    tiles    x [B, n, C] -> [B, n, I] ... -> [B, n, C], n tokens at a time, and so in the backward

Each tile is under activation checkpointing of its own: its backward computes it again, and what is inside of it is
alive for n tokens at a time. Outputs are those of the whole; the gradients of its weights are added up tile by tile.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_veomni.errors import UnsupportedError
from hf_veomni.expert import find_experts
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.attach import SequenceAttachment
from hf_veomni.sequence.kept import RULE as KEEP
from hf_veomni.sequence.kept import find_kept

RULE = "tokens"
TILE = 4096  # tokens of a rank: the matmuls of a tile are large enough by far, and what it keeps is not


def _tiled(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`forward` of [.., s, C] in tiles along s. No collective."""
    tiles = x.split(TILE, dim=-2)
    if len(tiles) == 1 or not torch.is_grad_enabled():
        return torch.cat([forward(tile) for tile in tiles], dim=-2) if len(tiles) > 1 else forward(x)
    # Nothing random is inside.
    again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(tile) for tile in tiles], dim=-2)  # type: ignore[misc]


def _is_token_wise(module: nn.Module, width: int, device: torch.device) -> bool:
    """Whether a module, with weights of other values, computes two parts of a row as it computes the row.

    Args:
        device: where it will run, since its kernels may run nowhere else.
    """
    generator = torch.Generator().manual_seed(0)
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = {
        name: (torch.randn(x.shape, generator=generator) * (x.shape[-1] if x.dim() else 1) ** -0.5).to(device)
        for name, x in named.items()
    }
    x = torch.randn(1, 6, width, generator=generator).to(device)
    call: Any = partial(torch.func.functional_call, module, values)
    with torch.no_grad():
        try:
            whole, parts = call((x,)), [call((part,)) for part in (x[:, :2], x[:, 2:])]
        except Exception:  # it takes something else
            return False
    if not isinstance(whole, Tensor) or whole.shape != x.shape:
        return False
    return bool(torch.allclose(whole, torch.cat(parts, dim=1), rtol=1e-4, atol=1e-5))


def _check(module: nn.Module, name: str, width: int, device: torch.device) -> None:
    rule = f"The rule `{RULE}` ('tiled') for {name!r}"
    if find_experts(module):
        raise UnsupportedError(
            f"{rule} cannot be combined with experts, whose tokens travel together: leave them out of it."
        )
    dropping = [key for key, m in module.named_modules() if isinstance(m, nn.Dropout) and m.p]
    if dropping:
        raise UnsupportedError(
            f"{rule} would draw other masks in {dropping[0]!r} than the MLP does at once: set its dropout to 0, or "
            "leave the rule out."
        )
    if not _is_token_wise(module, width, device):
        raise UnsupportedError(
            f"{rule}: {type(module).__name__} does not compute each token of [B, s, {width}] by itself, so it cannot "
            "be cut by tokens. Give the rule to an MLP, or leave it out."
        )


def _tile(module: nn.Module) -> Callable[[], Any]:
    """Returns what undoes it."""
    vars(module)["forward"] = partial(_tiled, module.forward)
    return partial(vars(module).pop, "forward", None)


def find_savings(
    base: nn.Module, attachment: SequenceAttachment | None, state: ParallelState
) -> list[Callable[[], Callable[[], Any]]]:
    """What has modules save memory or work by a plan's rules, and returns how to undo it: `find_kept`, `find_tiled`.

    Args:
        attachment: of the model's sequence; None of a family that cannot be cut.

    Raises:
        UnsupportedError: as both of them.
    """
    attentions = attachment.points.attentions if attachment is not None else []
    kept = find_kept(base, attentions, state) if state.plan.says(KEEP) else []
    return kept + find_tiled(base, state)


def find_tiled(base: nn.Module, state: ParallelState) -> list[Callable[[], Callable[[], Any]]]:
    """What has modules compute in tiles by a plan's rules, and returns how to undo it. No collectives.

    Raises:
        UnsupportedError: a rule for a module that does not compute each token by itself.
    """
    names = {name: module for name, module in base.named_modules() if name}
    width: Any = getattr(getattr(base, "config", None), "hidden_size", None)
    found: dict[str, nn.Module] = {}
    for pattern, rules in state.plan.modules.items():
        if RULE in rules:
            found |= {name: names[name] for name in fnmatch.filter(names, pattern)}
    checked: set[tuple[type, str]] = set()
    for name, module in found.items():
        kind = type(module), str(module)
        if kind not in checked:
            _check(module, name, width, state.device)
            checked.add(kind)
    return [partial(_tile, module) for module in found.values()]
