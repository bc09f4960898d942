"""What reads and converts the files of checkpoints: private names of transformers, as in `hf`.

Verified against transformers 5.23 and 5.24.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig, _get_resolved_checkpoint_files
from transformers.utils import logging


def find_weight_files(checkpoint: str | PathLike[str]) -> list[str]:
    """The safetensors files of a folder or a Hub id, downloaded if need be.

    Raises:
        OSError: nothing there, or no safetensors.
    """
    # "Remote code" stands for: no request to the Hub's bot to convert somebody's pickles.
    files, _ = _get_resolved_checkpoint_files(str(checkpoint), None, None, True, None, is_remote_code=True)
    found = list(files or [])
    if os.path.isdir(checkpoint):
        outside = [
            path for path in found if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(checkpoint))
        ]
        if outside:
            raise OSError(f"the index in '{checkpoint}' names a file outside of the folder ('{outside[0]}')")
    return found


@dataclass(frozen=True)
class LoadReport:
    """What did not fit when a checkpoint's tensors were put into a model; names are the model's, shapes global.

    Attributes:
        mismatched: (name, shape in the checkpoint after conversion, shape in the model).
        errors: name -> why the conversion to it failed.
        untied: names that are tied in the model and have different values in the checkpoint.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    errors: dict[str, str]
    untied: list[str]


def load_tensors(model: PreTrainedModel, tensors: dict[str, Tensor]) -> LoadReport:
    """transformers' own loader: rename and convert `tensors`, and put them into a model on meta, of one rank.

    What `from_pretrained` does between reading the files and the end, with dtypes as it chooses them.
    """
    config = LoadStateDictConfig(
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
    )
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would be over before anything is read
    try:
        info, _ = convert_and_load_state_dict_in_model(model, tensors, config, None)
    finally:
        if bar:
            logging.enable_progress_bar()
    tied = set(model.all_tied_weights_keys)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    wrong = {name for name, _, _ in info.mismatched_keys} | set(info.conversion_errors)
    return LoadReport(
        [name for name, t in model.state_dict(keep_vars=True).items() if t.is_meta and name not in wrong],
        sorted(info.unexpected_keys),
        [(name, tuple(found), tuple(wanted)) for name, found, wanted in sorted(info.mismatched_keys)],
        {name: text.strip().splitlines()[-1] for name, text in sorted(info.conversion_errors.items())},
        sorted(tied - set(model.all_tied_weights_keys)),
    )


def copy_conversions(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Let `save_pretrained` of `model` write the layout of the files that `load_tensors` put into `source`."""
    setattr(model, "_weight_conversions", source._weight_conversions)  # noqa: B010 (nn.Module's setter)


def to_files(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of a model's state dict under the names and in the arrangement that `save_pretrained` writes."""
    ignored = model._keys_to_ignore_on_save or ()
    return revert_weight_conversion(model, {name: t for name, t in tensors.items() if name not in ignored})


def compute_buffers(model: PreTrainedModel) -> list[str]:
    """Give the buffers that no checkpoint has (rotary frequencies) their values, where they are on meta.

    Everything else must have its value already.

    Returns:
        Names of the buffers for which the family has no rule.
    """
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
    for tensor in [*model.parameters(), *model.buffers()]:
        setattr(tensor, "_is_hf_initialized", True)  # noqa: B010 (what transformers' initialisers skip)
    computed = [name for name, buffer in model.named_non_persistent_buffers() if buffer.is_meta]
    for name in computed:
        owner, _, leaf = name.rpartition(".")
        blank = torch.zeros_like(model.get_buffer(name), device="cpu")
        setattr(model.get_submodule(owner), leaf, blank.fill_(float("nan")) if blank.is_floating_point() else blank)
    model.initialize_weights()
    return [name for name in computed if (b := model.get_buffer(name)).is_floating_point() and bool(b.isnan().any())]
