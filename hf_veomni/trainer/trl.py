"""TRL's trainers behind the mixin. TRL is not imported: a class is known by its module. Verified against TRL 1.16.

They load and adapt the model, score tokens with a fused head and compute their losses themselves, from the scores of
full rows. Reference models are sharded like the model that is trained.

The fused head is a forward that TRL puts on the model, which scores hidden states instead of returning logits:
`model(..., labels=labels, fused_lm_head=True)`. Labels that are shifted already it takes as `shift_labels` [B, s],
beside hidden states [B, s, C], which is what a rank holds. So none of it is replaced: one hook hands over the labels,
another gathers the scores. It reads the head's weight beside its module, of which FSDP2 knows nothing, so the head is
gathered before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial, wraps
from typing import Any

import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert import attach_router_loss
from hf_veomni.mesh import ParallelState, get_parallel_state, is_prepared
from hf_veomni.plan import ParallelPlan
from hf_veomni.prepare import gather_sequence, on_detach, prepare_omni
from hf_veomni.sequence.shard import shard_sequence

_SUPPORTED = ("SFTTrainer", "DPOTrainer", "RewardTrainer", "KTOTrainer")
_OF_ROWS = "SFTTrainer"
_WITH_REFERENCE = ("DPOTrainer", "KTOTrainer")
_NOTES = ("_metrics", "_total_train_tokens")  # what their losses note for the log
_SAMPLING = ("GRPOTrainer", "RLOOTrainer", "DistillationTrainer")


def _bases(trainer: object) -> list[str]:
    return [owner.__name__ for owner in type(trainer).__mro__ if owner.__module__.split(".")[0] == "trl"]


def is_trl(trainer: object) -> bool:
    """Whether this trainer is one of TRL's."""
    return bool(_bases(trainer))


def trains_rows(trainer: object) -> bool:
    """Whether it learns the tokens of rows, without pairs and reference models."""
    return _OF_ROWS in _bases(trainer)


def trl_name(trainer: object) -> str:
    """The class of TRL behind a trainer, as its documentation calls it."""
    return f"TRL's {_bases(trainer)[0]}"


@contextmanager
def noting_nothing(trainer: object) -> Iterator[None]:
    """Around a batch that counts on no rank: what a trainer of TRL notes of it for its log is forgotten."""
    kept = {name: deepcopy(vars(trainer)[name]) for name in _NOTES if name in vars(trainer) and is_trl(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(kept)


def adapt_trl(trainer: Any, accelerator: Any) -> None:
    """Over several ranks: let the fused head take full rows, and shard the models that a trainer of TRL hands to
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


def check_trl(trainer: object, args: Any, model: object, given: Mapping[str, Any]) -> None:
    """Refuse, over several ranks, what reads full parameters or samples while it trains.

    Args:
        given: to the trainer's constructor, by name.

    Raises:
        UnsupportedError: a trainer that is not known to work, an argument of one that does not, a prepared `PeftModel`
            for a trainer that compares it with a copy of its adapter, or adapters that it switches off under `pairs`.
    """
    plan: ParallelPlan = args.plan
    if plan.world_size == 1 or not is_trl(trainer):
        return
    names = _bases(trainer)
    if not set(names) & set(_SUPPORTED):
        reason = "nobody has compared it with one process"
        if set(names) & set(_SAMPLING):
            reason = (
                "it samples answers between its steps, for which each rank would need the full parameters, and "
                "assigns the prompts by process, so that the ranks of an SP group would train on different rows"
            )
        raise UnsupportedError(
            f"{names[0]} of TRL cannot be combined with the plan ({plan}): {reason}. Use {', '.join(_SUPPORTED)}, or "
            "one process."
        )
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        if getattr(args, name, False):
            raise UnsupportedError(
                f"`{name}` (True) of TRL's {names[0]} cannot be combined with the plan ({plan}): it reads full "
                "parameters, and each rank holds a part. Leave it out; the reference model is sharded like the "
                "trained one."
            )
    if set(names) & set(_WITH_REFERENCE) and isinstance(model, PeftModel) and is_prepared(model):
        raise UnsupportedError(
            f"`model` is prepared already, but {trl_name(trainer)} compares its adapter with a frozen copy, which "
            "comes before the parameters are sharded: pass the PeftModel as it was before `prepare_omni`."
        )
    adapted = isinstance(model, PeftModel) or given.get("peft_config") is not None
    if plan.overlap == "pairs" and set(names) & set(_WITH_REFERENCE) and adapted and given.get("ref_model") is None:
        raise UnsupportedError(
            f"`overlap` ('pairs') cannot be combined with adapters in {trl_name(trainer)}, which switches them off "
            "for its reference while the other of two sequences runs through the same layers: leave `overlap` out of "
            "the plan, or use 'chunks'."
        )


_MARK = "_omni_fused_head"
_ROUTER = "transformers.models.mixtral.modeling_mixtral"


def cut_fused_head(model: nn.Module) -> None:
    """Let a prepared model's fused head take and return full rows; without the head, nothing changes.

    What comes back has the scores of all tokens but the first, [B, S - 1], on every rank of the SP group, and the
    load-balancing loss of the routers, which the head takes from the module `_ROUTER`, over the tokens of all ranks.
    A second call does nothing.

    Collectives: one all-gather over the SP group for each score in a call; the backward is a reduce-scatter (sum). An
    all-gather of the head over `fsdp`, where it is not gathered yet.
    """
    base, state = hf.base_model(model), get_parallel_state(model)
    if hasattr(base, _MARK):
        return
    setattr(base, _MARK, True)
    undo: list[Any] = [partial(delattr, base, _MARK)]
    undo.append(base.register_forward_pre_hook(_gather_head, with_kwargs=True).remove)
    if getattr(hf.text_config(base), "num_experts_per_tok", None):
        undo.append(attach_router_loss(base, state, _ROUTER))
    if state.sp_size > 1:
        undo.append(base.register_forward_pre_hook(partial(_cut_labels, state), with_kwargs=True).remove)
        undo.append(base.register_forward_hook(_gather_scores, with_kwargs=True).remove)
    on_detach(base, undo)


def _gather_head(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Full weights until the backward has reduced their gradients, or the end of a forward without gradients."""
    if kwargs.get("fused_lm_head"):
        for module in model.get_output_embeddings().modules():
            if isinstance(module, FSDPModule):
                module.unshard()


def _cut_labels(state: ParallelState, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    if not kwargs.get("fused_lm_head"):
        return args, kwargs
    labels: Tensor = kwargs["labels"]
    padding = 1 + -labels.shape[1] % state.sp_size  # the last token of a row has no next one
    shifted = F.pad(labels[:, 1:], (0, padding), value=-100)
    return args, {**kwargs, "labels": None, "shift_labels": shard_sequence(shifted, 1, state)}


def _gather_scores(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    if not kwargs.get("fused_lm_head"):
        return output
    local = kwargs["shift_labels"].shape
    full: dict[str, Any] = {}
    for field in fields(output):
        value = getattr(output, field.name)
        if isinstance(value, Tensor) and value.shape == local:
            full[field.name] = gather_sequence(value, model)[:, :-1]
    # The mean over this rank's tokens alone, which no trainer that scores tokens reads.
    return replace(output, **full, loss=None)
