"""Packing that transformers would read off positions on the device is known already where a prepared backbone runs.

For each mask that it makes, transformers compares positions with their neighbours and asks the device whether any
document begins within a row (`find_packed_sequence_indices`, transformers 5.23). The documents of the row that runs
(`context`) answer in its place, if they were read of the same positions; for all others it looks itself.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from hf_veomni.attention.mask_reader import required
from hf_veomni.context import current

_NAME = "find_packed_sequence_indices"
_MARK = "_omni_tells"


def tell_packing() -> None:
    """Have transformers ask the documents first. Idempotent."""
    stock = required(_NAME)
    if hasattr(stock, _MARK):
        return

    @wraps(stock)
    def find(position_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        documents = current().documents
        if documents is None or torch.compiler.is_compiling() or not documents.told_by(position_ids):
            return stock(position_ids, *args, **kwargs)
        return documents.segments

    setattr(find, _MARK, stock)
    setattr(masking_utils, _NAME, find)


def untell_packing() -> None:
    """Put transformers' own function back, unless somebody has replaced it since."""
    setattr(masking_utils, _NAME, getattr(required(_NAME), _MARK, required(_NAME)))
