"""TRL's fused head under sequence parallelism: each rank scores its slice of the tokens, then the scores are gathered.

TRL puts a forward on the model that scores hidden states instead of returning logits, `model(..., labels=labels,
fused_lm_head=True)`. Labels that are shifted already it takes as `shift_labels` [B, s], beside hidden states
[B, s, H], which is what a rank holds. So none of it is replaced: one hook hands over the labels, another gathers.

It reads the head's weight beside its module, of which FSDP2 knows nothing: of a head in a unit of its own (another
dtype than the final norm's, a rule of the plan) it would take the shards, and the gradient of its rank's tokens alone.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_veomni import hf
from hf_veomni.expert import attach_router_loss
from hf_veomni.mesh import ParallelState, get_parallel_state
from hf_veomni.prepare import gather_sequence, on_detach
from hf_veomni.sequence.shard import shard_sequence

_MARK = "_omni_fused_head"
_ROUTER = "transformers.models.mixtral.modeling_mixtral"


def cut_fused_head(model: nn.Module) -> None:
    """Let a prepared model's fused head take and return whole rows; without the head, nothing changes.

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
    """Whole weights until the backward has reduced their gradients, or the end of a forward without gradients."""
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
    whole: dict[str, Any] = {}
    for field in fields(output):
        value = getattr(output, field.name)
        if isinstance(value, Tensor) and value.shape == local:
            whole[field.name] = gather_sequence(value, model)[:, :-1]
    # The mean over this rank's tokens alone, which no trainer that scores tokens reads.
    return replace(output, **whole, loss=None)
