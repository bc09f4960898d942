"""Weights as DeepSpeed and FSDP leave them: one plain torch file of all of them is read, what lies in parts is named.

    pytorch_model.bin[.index.json]   zero_to_fp32.py of DeepSpeed, `accelerate merge-weights`
    pytorch_model_fsdp.bin           accelerate and Trainer under FSDP with FULL_STATE_DICT

They are pickles, which are read with `weights_only=True`: they run no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_veomni.checkpoint.lazy import LazyTensor
from hf_veomni.checkpoint.manifest import names_within
from hf_veomni.errors import UnsupportedError

_CONSOLIDATED = (WEIGHTS_NAME, "pytorch_model_fsdp.bin")
# Pattern -> whose it is, and how to have it in one piece.
_PARTS = {
    "pytorch_model_fsdp_*/.metadata": (
        "FSDP's sharded weights",
        "`accelerate merge-weights {folder}/pytorch_model_fsdp_0 OUT` joins them",
    ),
    "pytorch_model_fsdp*_rank*.bin": (
        "FSDP's weights of one rank each",
        "save with `fsdp_state_dict_type: FULL_STATE_DICT`",
    ),
    "*/*mp_rank_*model_states.pt": (
        "DeepSpeed's partitions",
        "`python {folder}/zero_to_fp32.py {folder} OUT` joins them",
    ),
}
_OPTIMIZERS = ("optimizer.bin", "optimizer_0/.metadata", "*/*_optim_states.pt")


def find_torch_files(folder: Path) -> list[Path]:
    """The torch files that hold all weights of a folder without safetensors; none if there are none.

    Raises:
        ValueError: an index that cannot be read, or that names what is not there.
        UnsupportedError: weights in parts, with the way to join them.
    """
    if any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return []
    for name in _CONSOLIDATED:
        if (folder / name).is_file():
            return [folder / name]
    if (folder / WEIGHTS_INDEX_NAME).is_file():
        return _of_index(folder / WEIGHTS_INDEX_NAME)
    for pattern, (what, way_out) in _PARTS.items():
        if (found := next(iter(sorted(folder.glob(pattern))), None)) is not None:
            raise UnsupportedError(
                f"'{folder}' holds {what} ('{found.relative_to(folder)}'), which are not read: "
                f"{way_out.format(folder=folder)}."
            )
    return []


def _of_index(path: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        files = [path.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' cannot be read ({type(error).__name__}: {error}).") from error
    for file in files:
        if not names_within(file, path.parent):
            raise ValueError(f"'{path}' names a file outside of its folder ('{file}'), which is not read.")
        if not file.is_file():
            raise ValueError(f"'{path.parent}' is incomplete: '{file.name}' of {path.name} does not exist.")
    return files


def open_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, by name, that are read when they are wanted.

    Raises:
        ValueError: a file that cannot be read, that holds more than tensors, or that would run code.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(
            f"'{path}' cannot be read as a torch file of tensors alone ({str(error).splitlines()[0]}): write it again "
            "as safetensors with the tool that made it."
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"'{path}' holds a {type(found).__name__} and must hold tensors by name.")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"'{path}' holds a {type(value).__name__} under {name!r} and must hold tensors by name: save the "
                "model's state dict alone."
            )
    return {name: LazyTensor(value.shape, value.dtype, value.__getitem__) for name, value in found.items()}


def foreign_training(checkpoint: Path) -> str | None:
    """That a checkpoint of a run is DeepSpeed's or FSDP's, in words; None if it is not."""
    if (checkpoint / "optimizer.pt").is_file() or (checkpoint / "optimizer").is_dir():
        return None
    for pattern in _OPTIMIZERS:
        if (found := next(iter(sorted(checkpoint.glob(pattern))), None)) is not None:
            return (
                f"its optimizer ('{found.relative_to(checkpoint)}') is as DeepSpeed or FSDP leave it, of whose "
                "checkpoints the weights alone can be read"
            )
    return None
