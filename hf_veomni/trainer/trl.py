"""TRL's trainers behind the mixin. TRL is not imported: a class is known by its module. Verified against TRL 1.16.

SFTTrainer scores hidden states with a head of its own, which wants whole rows; under a plan the loss is the model's.
"""

from __future__ import annotations

from typing import Any

from hf_veomni.plan import ParallelPlan

_SUPPORTED = ("SFTTrainer",)


def is_trl(trainer: Any) -> bool:
    return any(owner.__module__.split(".")[0] == "trl" for owner in type(trainer).__mro__)


def check_trl(trainer: Any, args: Any) -> None:
    """Refuse, over several ranks, trainers of TRL whose loss reads hidden states or logits of whole rows.

    Raises:
        ValueError: another trainer than SFTTrainer, or a loss of it that is not the model's.
    """
    plan: ParallelPlan = args.plan
    if plan.world_size == 1 or not is_trl(trainer):
        return
    names = [owner.__name__ for owner in type(trainer).__mro__ if owner.__module__.split(".")[0] == "trl"]
    if not set(names) & set(_SUPPORTED):
        raise ValueError(
            f"{names[0]} of TRL does not go with the plan ({plan}): its loss reads whole rows, and each rank holds a "
            f"part. Use {', '.join(_SUPPORTED)}, or one process."
        )
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type not in (None, "nll"):
        raise ValueError(
            f"`loss_type` ({loss_type!r}) of TRL's SFTTrainer does not go with the plan ({plan}): use 'nll'."
        )
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            f"The router's auxiliary loss of TRL's SFTTrainer does not go with the plan ({plan}): set "
            "`output_router_logits=False` in the model's config."
        )
