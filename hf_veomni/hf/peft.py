"""What touches structural names of PEFT: its kinds of modules and methods. Verified against peft 0.20 and 0.21."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from hf_veomni.errors import UnsupportedError

# Of a tuner that calls `forward` of the base model in place of the model, in a hook of its own (X-LoRA).
_CALLS_PAST_HOOKS = frozenset({"ADALORA", "ADAPTION_PROMPT", "XLORA"})


def check_adapters(model: Any, world_size: int, sp_size: int) -> None:
    """Raise UnsupportedError, by its name, for a PEFT method that goes past what a plan puts on the base model."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        tuner: Any = model.base_model
        own = type(tuner).forward is not BaseTuner.forward and not isinstance(model, PreTrainedModel)
        past = kind in _CALLS_PAST_HOOKS or (own and _names_forward(tuner))
        if past and world_size > 1:
            raise UnsupportedError(
                f"PEFT method {kind} (adapter '{name}') calls the forward of the base model past its hooks, by which "
                f"{world_size} ranks share parameters and rows: use LoRA or another method, or one rank."
            )
        if sp_size > 1 and picks_tokens_by_place(model):
            raise UnsupportedError(
                f"`alora_invocation_tokens` of adapter '{name}' counts tokens from the end of the row, and layers at "
                f"`sp_size` ({sp_size}) see a part of it: use LoRA without them, or sp_size=1."
            )


def _names_forward(tuner: nn.Module) -> bool:
    return "forward" in inspect.unwrap(type(tuner).forward).__code__.co_names


def call_with_hooks(model: object) -> Callable[[], None]:
    """Let a tuner call its model, in place of the model's forward past all hooks, as peft 0.20 did.

    Returns:
        A function that takes this off again.
    """
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, BaseTuner) and type(tuner).forward is BaseTuner.forward and _names_forward(tuner):
        tuner.forward = partial(_call, tuner.model)  # type: ignore[method-assign]
        return partial(_forget_call, tuner)
    return _nothing


def _call(model: nn.Module, *args: object, **kwargs: object) -> Any:
    return model(*args, **kwargs)


def _forget_call(tuner: nn.Module) -> None:
    vars(tuner).pop("forward", None)


def _nothing() -> None:
    pass


def picks_tokens_by_place(model: object) -> bool:
    """Whether some adapter works on tokens by their place in the row (activated LoRA)."""
    configs = (getattr(model, "peft_config", None) or {}).values()
    return any(getattr(config, "alora_invocation_tokens", None) is not None for config in configs)


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is what PEFT puts around one of the model: an adapted layer, a trained copy, trained tokens."""
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def adapters_in_use(adapted: Iterable[Any]) -> frozenset[tuple[str, ...]]:
    """Names of the adapters that run, of all modules together: one entry if it is the same for each of them."""
    return frozenset(() if one.disable_adapters else tuple(one.active_adapters) for one in adapted)
