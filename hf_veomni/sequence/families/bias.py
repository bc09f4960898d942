"""Relative position biases that an attention makes itself, for the full row.

T5's first layer asks `compute_bias(query_length, key_length, ...)` for the lengths of what it holds, a slice of the
row. The method is replaced by one that makes the bias of the full row, [1, H, S', S']; the exchange takes this rank's
heads of it, so a rank has the gradient of the table for its heads, over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from hf_veomni.sequence.attention import is_cross
from hf_veomni.sequence.backbone import BIAS_METHODS


class _Replaced:
    """Handle of the methods that were replaced on one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def remove(self) -> None:
        for name in BIAS_METHODS:
            if isinstance(vars(self.module).get(name), partial):
                del vars(self.module)[name]


def attach_bias(module: nn.Module, sp_size: int, is_cut: Callable[[], bool]) -> _Replaced:
    """Have an attention's position bias made for the full row where it is asked for a slice.

    Args:
        is_cut: whether the running forward, or recomputation, works on slices.

    Returns:
        A handle with `remove`; of nothing where the module makes no bias.
    """
    for name in BIAS_METHODS:
        original = getattr(module, name, None)
        if callable(original):
            vars(module)[name] = partial(_full_bias, module, type(module), name, sp_size, is_cut)
    return _Replaced(module)


def _full_bias(
    module: nn.Module,
    owner: type,
    name: str,
    sp_size: int,
    is_cut: Callable[[], bool],
    query_length: int,
    key_length: int,
    *args: object,
    **kwargs: object,
) -> Any:
    if is_cut() and not is_cross(module):
        query_length, key_length = query_length * sp_size, key_length * sp_size
    return getattr(owner, name)(module, query_length, key_length, *args, **kwargs)
