"""TRL's trainers behind the mixin. TRL is not imported: a class is known by its module. Verified against TRL 1.16.

Under a plan SFTTrainer's loss is the model's. DPOTrainer's is its own, computed from the scores of whole rows
(`fused_head`), and its reference model is sharded like the model that is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_veomni.mesh import get_parallel_state
from hf_veomni.plan import ParallelPlan
from hf_veomni.prepare import prepare_omni
from hf_veomni.trainer.adapt import is_prepared
from hf_veomni.trainer.fused_head import cut_fused_head

_SUPPORTED = ("SFTTrainer", "DPOTrainer")
_REFERENCE = "ref"  # the frozen copy of an adapter that DPOTrainer compares with


def _bases(trainer: Any) -> list[str]:
    return [owner.__name__ for owner in type(trainer).__mro__ if owner.__module__.split(".")[0] == "trl"]


def is_trl(trainer: Any) -> bool:
    return bool(_bases(trainer))


def computes_model_loss(trainer: Any) -> bool:
    """Whether a trainer of TRL is one whose loss is the model's own: SFTTrainer with its default loss."""
    return "SFTTrainer" in _bases(trainer)


def add_reference_adapter(trainer: Any, model: Any) -> None:
    """Make the copy of the adapter that DPOTrainer would make, before the parameters are sharded.

    Raises:
        ValueError: several adapters, of which none is known to be the trained one.
    """
    if "DPOTrainer" not in _bases(trainer) or not isinstance(model, PeftModel) or _REFERENCE in model.peft_config:
        return
    if list(model.peft_config) != ["default"]:
        raise ValueError(
            f"`model` has the adapters {list(model.peft_config)}, and DPOTrainer trains 'default' against a copy of "
            "it: hand over a PeftModel with that one adapter, or `peft_config`."
        )
    if is_prepared(model):
        raise ValueError(
            "`model` is prepared already, but DPOTrainer compares its adapter with a frozen copy, which comes before "
            "the parameters are sharded: hand over the PeftModel as it was before `prepare_omni`."
        )
    model.add_adapter(_REFERENCE, model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", f".{_REFERENCE}.")).data.copy_(parameter.data)


@contextmanager
def adapted_construction(trainer: Any, model: Any) -> Iterator[None]:
    """Inside, DPOTrainer's constructor finds the reference adapter that is there already."""
    if "DPOTrainer" not in _bases(trainer) or model is None or get_parallel_state(model).world_size == 1:
        yield
        return
    cut_fused_head(model)
    if not isinstance(model, PeftModel):
        yield
        return
    add_adapter = model.add_adapter
    model.add_adapter = lambda name, *args, **kwargs: (  # type: ignore[method-assign]
        None if name == _REFERENCE else add_adapter(name, *args, **kwargs)
    )
    try:
        yield
    finally:
        del model.add_adapter


def shard_references(trainer: Any, accelerator: Any, plan: ParallelPlan) -> None:
    """Shard the models that a trainer of TRL hands to accelerate for evaluation: its reference model."""
    if plan.world_size == 1 or not is_trl(trainer):
        return
    prepare_model = accelerator.prepare_model

    @wraps(prepare_model)
    def prepare(model: nn.Module, *args: Any, evaluation_mode: bool = False, **kwargs: Any) -> nn.Module:
        if evaluation_mode and isinstance(model, PreTrainedModel) and not is_prepared(model):
            cut_fused_head(prepare_omni(model.requires_grad_(False), plan))
        return prepare_model(model, *args, evaluation_mode=evaluation_mode, **kwargs)

    accelerator.prepare_model = prepare


def check_trl(trainer: Any, args: Any) -> None:
    """Refuse, over several ranks, trainers of TRL whose loss reads hidden states or logits of whole rows.

    Raises:
        ValueError: another trainer than SFTTrainer, or a loss of it that is not the model's.
    """
    plan: ParallelPlan = args.plan
    if plan.world_size == 1 or not is_trl(trainer):
        return
    names = _bases(trainer)
    if not set(names) & set(_SUPPORTED):
        raise ValueError(
            f"{names[0]} of TRL does not go with the plan ({plan}): its loss reads whole rows, and each rank holds a "
            f"part. Use {', '.join(_SUPPORTED)}, or one process."
        )
    loss_type = getattr(args, "loss_type", "nll")
    if computes_model_loss(trainer) and loss_type not in (None, "nll"):
        raise ValueError(
            f"`loss_type` ({loss_type!r}) of TRL's SFTTrainer does not go with the plan ({plan}): use 'nll'."
        )
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        if getattr(args, name, False):
            raise ValueError(
                f"`{name}` (True) of TRL's {names[0]} does not go with the plan ({plan}): it reads whole parameters, "
                "and each rank holds a part. Leave it out; the reference model is sharded like the trained one."
            )
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            f"The router's auxiliary loss of TRL's {names[0]} does not go with the plan ({plan}): set "
            "`output_router_logits=False` in the model's config."
        )
