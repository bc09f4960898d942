"""Positions of a document that holds images, videos or audio, as its model numbers them.

T: tokens of one document. A model with mRoPE takes several positions a token, [axes, rows, tokens]; of these the first
axis counts tokens, as in text, and is where packed documents are told apart.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_veomni.data.sample import with_text_axis
from hf_veomni.errors import UnsupportedError

# The names under which `get_rope_index` of some family takes a column.
_ALSO_KNOWN_AS = {
    "second_per_grids": ("second_per_grid_ts", "video_second_per_grid"),
    "second_per_grid_ts": ("video_second_per_grid",),
}
_TOKEN_TYPES = (("image", 1), ("video", 2), ("audio", 3))  # as `ProcessorMixin.create_mm_token_type_ids` numbers them


class RopeIndex:
    """`get_rope_index` of a model, from its config alone: no weights are made.

    Args:
        config: of the model, for example `model.config`; of an omni model with a thinker, its thinker's is read.
        placeholders: token ids by modality, for samples without `mm_token_type_ids`.
    """

    def __init__(self, config: object, placeholders: Mapping[str, tuple[int, ...]]) -> None:
        self.config = getattr(config, "thinker_config", None) or config
        self.placeholders = placeholders
        self._owner = find_owner(self.config)
        self._model: Any = None

    def __bool__(self) -> bool:
        """Whether the model has mRoPE."""
        return self._owner is not None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}  # a worker builds its own

    def __call__(self, input_ids: Tensor, **columns: object) -> Tensor:
        """Positions of one document [1, T] -> [axes, 1, T], without the axis that counts tokens."""
        assert self._owner is not None
        if self._model is None:
            with torch.device("meta"):
                self._model = self._owner(self.config)
        types = torch.zeros_like(input_ids)
        for modality, number in _TOKEN_TYPES:
            for token in self.placeholders.get(modality, ()):
                types[input_ids == token] = number
        ones = torch.ones_like(input_ids)  # the omni families count their text by it
        columns = {"mm_token_type_ids": types, "audio_seqlens": _frames(columns)} | columns | {"attention_mask": ones}
        return self._model.get_rope_index(input_ids, **_accepted(self._model.get_rope_index, columns))[0]


def find_owner(config: object) -> type | None:
    """The class that computes the positions of a config's model, None if the model counts tokens alone.

    Raises:
        UnsupportedError: a model whose positions leave no room for those of the text, so that it cannot keep packed
            documents apart.
    """
    package, _, module = type(config).__module__.rpartition(".")
    if not module.startswith("configuration_"):
        return None
    name = f"{package}.{module.replace('configuration_', 'modeling_', 1)}"
    modeling = sys.modules.get(name) or import_module(name)
    owners = [
        value
        for value in vars(modeling).values()
        if isinstance(value, type)
        and hasattr(value, "get_rope_index")
        and getattr(value, "config_class", None) is type(config)
    ]
    if not owners:
        return None
    if "shape[0] == 4" not in inspect.getsource(modeling):
        raise UnsupportedError(
            f"{type(config).__name__}: this family's mRoPE takes no text positions beside those of images, and cannot "
            "keep packed documents apart: train it unpacked."
        )
    return owners[0]


def document_positions(
    compute: Callable[..., Any], tokens: Mapping[str, np.ndarray], items: Mapping[str, Tensor]
) -> np.ndarray:
    """Positions of one document as its model numbers them, int64 [axes, T], the one that counts tokens first.

    Args:
        compute: called with `input_ids` [1, T] and those of the other columns that its signature takes; returns
            positions [1, T] or [axes, 1, T], or a tuple that begins with them.
        tokens: the document's columns of one number a token, [T].
        items: its columns of items.

    Raises:
        ValueError: positions of another shape, or some that do not count tokens.
    """
    columns: dict[str, Any] = {name: torch.from_numpy(values)[None] for name, values in tokens.items()} | dict(items)
    ids = columns.pop("input_ids")
    found = compute(ids, **_accepted(compute, columns))
    found = torch.as_tensor(found[0] if isinstance(found, tuple | list) else found)
    positions = with_text_axis(found.numpy(), ids.shape[1], "the model's own positions")
    if (positions[0] != np.arange(ids.shape[1])).any():
        raise ValueError(
            "`get_pos_id` gave a document positions whose first axis does not count 0, 1, 2, ...: packed documents "
            "are told apart by it, so return [4, 1, T] with token counts first."
        )
    return positions


def _accepted(function: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the columns that a function takes, under the names it takes them by."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        accepted = dict(columns)
    else:
        accepted = {name: value for name, value in columns.items() if name in parameters}
    for name, others in _ALSO_KNOWN_AS.items():
        known = next((columns[other] for other in others if other in columns), None)
        if name in parameters and name not in accepted and known is not None:
            accepted[name] = known
    return accepted


def _frames(columns: Mapping[str, Any]) -> Tensor | None:
    mask = columns.get("feature_attention_mask")
    return None if mask is None else torch.as_tensor(mask).sum(-1)
