"""TRL's trainers behind the mixin. TRL is not imported: a class is known by its module. Verified against TRL 1.16.

They load and adapt the model, score tokens with a fused head and compute their losses themselves, from the scores of
whole rows (`fused_head`). Reference models are sharded like the model that is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import wraps
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_veomni.errors import UnsupportedError
from hf_veomni.plan import ParallelPlan
from hf_veomni.prepare import prepare_omni
from hf_veomni.trainer.adapt import is_prepared
from hf_veomni.trainer.fused_head import cut_fused_head

_SUPPORTED = ("SFTTrainer", "DPOTrainer", "RewardTrainer", "KTOTrainer")
_WITH_REFERENCE = ("DPOTrainer", "KTOTrainer")
_NOTES = ("_metrics", "_total_train_tokens")  # what their losses note for the log
_SAMPLING = ("GRPOTrainer", "RLOOTrainer", "DistillationTrainer")


def _bases(trainer: Any) -> list[str]:
    return [owner.__name__ for owner in type(trainer).__mro__ if owner.__module__.split(".")[0] == "trl"]


def is_trl(trainer: Any) -> bool:
    return bool(_bases(trainer))


def trl_name(trainer: Any) -> str:
    """The class of TRL behind a trainer, as its documentation calls it."""
    return f"TRL's {_bases(trainer)[0]}"


@contextmanager
def noting_nothing(trainer: Any) -> Iterator[None]:
    """Around a batch that counts on no rank: what a trainer of TRL notes of it for its log is forgotten."""
    kept = {name: deepcopy(vars(trainer)[name]) for name in _NOTES if name in vars(trainer) and is_trl(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(kept)


def adapt_trl(trainer: Any, accelerator: Any) -> None:
    """Over several ranks: let the fused head take whole rows, and shard the models that a trainer of TRL hands to
    accelerate for evaluation, its reference model."""
    plan: ParallelPlan = trainer.args.plan
    if plan.world_size == 1 or not is_trl(trainer):
        return
    cut_fused_head(trainer.model)
    prepare_model = accelerator.prepare_model

    @wraps(prepare_model)
    def prepare(model: nn.Module, *args: Any, evaluation_mode: bool = False, **kwargs: Any) -> nn.Module:
        if evaluation_mode and isinstance(model, PreTrainedModel) and not is_prepared(model):
            cut_fused_head(prepare_omni(model.requires_grad_(False), plan))
        return prepare_model(model, *args, evaluation_mode=evaluation_mode, **kwargs)

    accelerator.prepare_model = prepare


def check_trl(trainer: Any, args: Any, model: Any) -> None:
    """Refuse, over several ranks, what reads whole parameters or samples while it trains.

    Raises:
        UnsupportedError: a trainer that is not known to work, an argument of one that does not, or a prepared
            `PeftModel` for a trainer that compares it with a copy of its adapter.
    """
    plan: ParallelPlan = args.plan
    if plan.world_size == 1 or not is_trl(trainer):
        return
    names = _bases(trainer)
    if not set(names) & set(_SUPPORTED):
        reason = "nobody has compared it with one process"
        if set(names) & set(_SAMPLING):
            reason = (
                "it samples answers between its steps, for which each rank would need the whole parameters, and deals "
                "the prompts out by process, so that the ranks of an SP group would train on different rows"
            )
        raise UnsupportedError(
            f"{names[0]} of TRL does not go with the plan ({plan}): {reason}. Use {', '.join(_SUPPORTED)}, or one "
            "process."
        )
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        if getattr(args, name, False):
            raise UnsupportedError(
                f"`{name}` (True) of TRL's {names[0]} does not go with the plan ({plan}): it reads whole parameters, "
                "and each rank holds a part. Leave it out; the reference model is sharded like the trained one."
            )
    if set(names) & set(_WITH_REFERENCE) and isinstance(model, PeftModel) and is_prepared(model):
        raise UnsupportedError(
            f"`model` is prepared already, but {trl_name(trainer)} compares its adapter with a frozen copy, which "
            "comes before the parameters are sharded: hand over the PeftModel as it was before `prepare_omni`."
        )
