"""`prepare_omni`: the fixed order of the steps, nothing else."""

from __future__ import annotations

import difflib
import fnmatch
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from hf_veomni import hf
from hf_veomni.checkpoint import (
    PendingWeights,
    attach_stock_calls,
    check_parameters,
    materialize_weights,
    retain_weights,
)
from hf_veomni.comm.agree import together
from hf_veomni.context import leave_when_interrupted
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert import attach_experts, attach_router_loss, check_model, cut_into_chunks, find_experts
from hf_veomni.fsdp import (
    attach_pairs,
    check_overlap,
    check_same_value,
    check_units,
    mark_replaced,
    shard_parameters,
    synchronize_parameters,
)
from hf_veomni.hf import peft as hf_peft
from hf_veomni.host import forget_in_graphs
from hf_veomni.logs import announce, warn_of_no_plan
from hf_veomni.loss import LazyLogits, attach_chunked_loss
from hf_veomni.mesh import ParallelState, get_parallel_state, init_parallel_state, settle_device
from hf_veomni.modality.towers import attach_towers
from hf_veomni.pipeline import Stages, attach_border, cut_model, join_stages, plan_stages
from hf_veomni.plan import ParallelPlan
from hf_veomni.sequence.attach import SequenceAttachment, attach_sequence
from hf_veomni.sequence.backbone import counts_rows
from hf_veomni.sequence.calls import attach_calls, check_no_gradient_hooks
from hf_veomni.sequence.pipelined import pipeline
from hf_veomni.sequence.randomness import attach_dropout
from hf_veomni.tiles import find_savings

Model = TypeVar("Model", bound=nn.Module)

_STATE, _UNDO, _SEQUENCE = "_omni_parallel_state", "_omni_undo", "_omni_attachment"


def _check_fresh(base: nn.Module) -> None:
    if hasattr(base, _STATE):
        raise ValueError(
            f"{type(base).__name__} is already prepared: call `detach_omni(model)` first. On several ranks its "
            "parameters stay sharded, so load the model again there."
        )


def build_parallelize_model(
    model: Model,
    plan: ParallelPlan | str | None,
    state: ParallelState,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Model:
    """The lower step: make the ranks' parameters equal and shard them with FSDP2, without touching the sequence.

    Args:
        model: a transformers model or a `PeftModel`, the same architecture on all ranks.
        plan: must be the plan of `state`, or None.
        mp_policy: FSDP2's mixed precision policy.
        checkpoint: as in `prepare_omni`.

    Returns:
        The same model on this rank's device, its parameters DTensors (unchanged in a world of one rank).

    Raises:
        ValueError: `plan` differs from the state's; parameters already sharded; rules that match nothing; a checkpoint
            that is not the model's.
    """
    if plan is not None and ParallelPlan.parse(plan).resolve(state.world_size) != state.plan:
        raise ValueError(f"`plan` ({plan}) differs from the plan of `state` ({state.plan}): pass one of them.")
    with together("Preparing the model"):
        pending = check_parameters(model, checkpoint)
    if state.plan.pp_size > 1:
        raise UnsupportedError(
            f"`pp_size` ({state.plan.pp_size}) needs more than shards: use prepare_omni(model, plan)."
        )
    with _undone_on_failure() as undo:
        _parallelize(model, state, mp_policy, pending, undo)
    return model


@contextmanager
def _undone_on_failure() -> Iterator[list[Callable[[], Any]]]:
    """Hands out a list for steps that undo what the block does; where it fails, they run, the last one first."""
    undo: list[Callable[[], Any]] = []
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _parallelize(
    model: nn.Module,
    state: ParallelState,
    mp_policy: MixedPrecisionPolicy | None,
    pending: PendingWeights | None,
    undo: list[Callable[[], Any]],
    stages: Stages | None = None,
) -> None:
    """The parameters. Adds to `undo` how to take off all but the shards, and marks the model as prepared.

    Args:
        stages: how a pipeline cuts the model, once the ranks have found theirs to be the same.
    """
    base = hf.base_model(model)
    before = list(model.parameters())
    with together("Preparing the model"):
        check_overlap(base, state)
        check_units(base, state)
        if state.world_size > 1:
            check_no_gradient_hooks(model)
        overlaps = state.plan.overlap == "chunks" or state.plan.says("overlap")
        attaching = _find_chunked(base, state) if overlaps else []
        attaching += find_savings(base, getattr(base, _SEQUENCE, None), state)
        if pending is None and stages is None:
            model.to(state.device)
    synchronize_parameters(model, state.device)
    if pending is not None:
        retain_weights(model, pending)
    if stages is not None:
        cut_model(stages, base, state, None if mp_policy is None else mp_policy.param_dtype)
        if pending is None:
            model.to(state.device)
    undo.extend(attach() for attach in attaching)
    experts = attach_experts(base, state, undo) if stages is None or find_experts(base) else []
    shard_parameters(base, state, mp_policy, experts)
    if state.plan.overlap == "pairs":
        attach_pairs(base, undo)
    if pending is not None:
        materialize_weights(model, pending, state.device)
    if stages is not None:
        join_stages(model, stages.tied, state)
    mark_replaced(before, model)
    undo += [attach_stock_calls(model, base, state.world_size), leave_when_interrupted(model)]
    setattr(base, _STATE, state)
    setattr(base, _UNDO, undo)


def prepare_omni(
    model: Model,
    plan: ParallelPlan | str | None = None,
    *,
    attention: str = "auto",
    chunked_loss: bool = True,
    mp_policy: MixedPrecisionPolicy | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    lean_loss: bool | None = None,
) -> Model:
    """Make a stock model train under a plan: sharded parameters, sequence parallelism, packing, a chunked loss.

    The model takes full rows [B, S], the same on all ranks of an SP group, and returns this rank's logits [B, s, V];
    `out.loss` is the loss of the full row on every rank. Gradients averaged over the fsdp mesh (which FSDP does) are
    the one-rank gradients. Order: check, mark and hook the attention, replace loss and head, shard the parameters.
    Optimizers come after it: one that was made from the parameters before raises at its first step.

    Args:
        model: a transformers model, or a `PeftModel` on one.
        plan: `ParallelPlan`, string, mapping or yaml path; None reads what the launcher passed on.
        attention: "auto" selects the varlen attention in place of sdpa; "keep" leaves the model's choice.
        chunked_loss: compute the training loss without the full logits.
        mp_policy: FSDP2's mixed precision policy.
        checkpoint: for a model built on the meta device: folder or Hub id of its safetensors files, as from_pretrained
            takes them. Each rank reads its part; adapters of a `PeftModel` are initialised alike on all ranks.
        lean_loss: the old name of `chunked_loss`, until the next release.

    Returns:
        The same model object.

    Collectives: creates the process groups of the plan and compares the parameters of all ranks. Where one rank
    refuses, all ranks raise.

    Raises:
        ValueError: a plan that does not fit the world, ranks that differ in plan or model, another checkpoint.
        UnsupportedError: what the plan asks for is not there for this model; it stays as it was until it is sharded.
    """
    if lean_loss is not None:
        warnings.warn("`lean_loss` is now called `chunked_loss`.", FutureWarning, stacklevel=2)
        chunked_loss = lean_loss
    settle_device()  # before the first collective
    with together("Preparing the model"):
        base = hf.base_model(model)
        given, plan = plan, ParallelPlan.parse(plan)
        _check_fresh(base)
        pending = check_parameters(model, checkpoint)
    check_same_value("plan", plan)
    state, counts = init_parallel_state(plan), _count(model)  # of all stages
    with _undone_on_failure() as undo:
        with together("Preparing the model"):
            hf_peft.check_adapters(model, state.world_size, state.sp_size)
            undo.append(hf_peft.call_with_hooks(model))
            check_model(base, state)
            stages = plan_stages(base, state) if state.plan.pp_size > 1 else None
            _attach(base, state, attention, chunked_loss, undo, apart=not hf_peft.picks_tokens_by_place(model))
            if stages is not None:
                undo.append(attach_border(base, state, stages.chain.inputs))
        _parallelize(model, state, mp_policy, pending, undo, stages)
    _tell(model, state, counts, unplanned=given is None and plan == ParallelPlan())
    return model


def _tell(model: nn.Module, state: ParallelState, counts: tuple[int, int], unplanned: bool) -> None:
    """Name the plan in force, and say if nobody has chosen it."""
    trained, total = counts
    announce(f"{_describe(model, state)}, {trained:,} of {total:,} parameters trained.")
    if unplanned:
        warn_of_no_plan(state.world_size)


def _count(model: nn.Module) -> tuple[int, int]:
    """Numbers that are trained, and all."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _describe(model: Any, state: ParallelState) -> str:
    """The plan in force, in a few words."""
    base: Any = hf.base_model(model)
    stage = " in the first stage" if state.plan.pp_size > 1 else ""
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    parts = [
        f"{type(base).__name__.removeprefix('FSDP')} under the plan {state.plan}",
        f"{state.world_size} {'ranks' if state.world_size > 1 else 'rank'} on {state.device.type}",
        f"{state.dp_size} of them with data of their own" if state.sp_size > 1 else "",
        # ModernBERT's `get_decoder` finds its head, which has no config.
        f"attention {hf.attention_name(getattr(hf.find_backbone(base), 'config', base.config))}",
        f"{units} FSDP units{stage}" if units else "",
    ]
    return ", ".join(filter(None, parts))


def _attach(
    base: Any, state: ParallelState, attention: str, chunked_loss: bool, undo: list[Callable[[], Any]], apart: bool
) -> None:
    """Everything but the parameters. Adds to `undo` how to take each piece off.

    Args:
        apart: whether the adapters work alike on documents in a row and alone.

    These steps are bound methods and partials of plain functions, no closures: so a deep copy of the model gets steps
    of its own, which take nothing off the original.
    """
    state.plan.match_modules(name for name, _ in base.named_modules() if name)
    reasons: dict[str, str] = {}
    if not apart:
        reasons["packed"] = "activated LoRA counts tokens from the end of the row. Train it on one document a row."
    try:
        undo.append(attach_chunked_loss(base, state.sp_group, chunked=chunked_loss))
    except UnsupportedError as error:
        reasons["labels"] = str(error)
    headless = hf.find_backbone(base) is base  # hands out hidden states, of which every rank has its part
    if not headless and counts_rows(base):
        reasons["packed"] = f"{type(base).__name__} counts the tokens of a row. Train it on one document a row."
    try:
        attachment = attach_sequence(base, state, attention, full_output="labels" in reasons and not headless)
        setattr(base, _SEQUENCE, attachment)
        undo.extend([attachment.detach, partial(delattr, base, _SEQUENCE)])
        if attachment.gather_point is not None:
            reasons["full"] = "the head works on the full row"
    except UnsupportedError as error:
        named = any(
            rules.get("sp") == "gather" for rules in state.plan.modules.values()
        )  # which would be without effect
        if state.sp_size > 1 or named:
            raise
        reasons["packed"] = str(error)
    if not state.pp_rank:  # the other stages run none
        attach_towers(base, state, undo, attention)
    detach = attach_router_loss(base, state)
    if detach is None:
        reasons["router"] = f"{type(base).__name__} computes it inside its forward"
    else:
        undo.append(detach)
    undo.append(attach_calls(base, state, reasons))
    undo.append(forget_in_graphs(base))  # before all others
    if state.sp_size > 1 or state.plan.pp_size > 1:
        undo.append(attach_dropout(base, state))


def _find_chunked(base: Any, state: ParallelState) -> list[Callable[[], Callable[[], Any]]]:
    """What has attention and experts exchange in chunks, and returns how to undo it.

    Raises:
        UnsupportedError: nothing is exchanged, or nothing that a rule is for.
    """
    names = {module: name for name, module in base.named_modules() if name}
    exchanging: dict[str, Callable[[], Callable[[], Any]]] = {}
    attachment: SequenceAttachment | None = getattr(base, _SEQUENCE, None)
    if attachment is not None and state.sp_size > 1:
        exchanging |= {names[module]: partial(pipeline, module) for module in attachment.points.attentions}
    if state.ep_size > 1:
        exchanging |= {module.name: partial(cut_into_chunks, module.experts) for module in find_experts(base)}
    if not exchanging:
        raise UnsupportedError(
            f"`overlap` ('chunks') has no effect on {type(base).__name__} under the plan ({state.plan}): no attention "
            "or experts exchange anything. Set `sp_size` or `ep_size` above 1, or leave it out."
        )
    for pattern, rules in state.plan.modules.items():
        if "overlap" in rules and not fnmatch.filter(exchanging, pattern):
            near = difflib.get_close_matches(pattern, exchanging, n=3, cutoff=0.0)
            raise UnsupportedError(
                f"The rule `overlap` ({rules['overlap']!r}) for {pattern!r} has no effect: no attention or experts "
                f"module that exchanges anything under the plan ({state.plan}) has such a name. Near: {near}."
            )
    matched = state.plan.match_modules(names.values())
    chosen = {name: matched.get(name, {}).get("overlap", state.plan.overlap) for name in exchanging}
    return [attach for name, attach in exchanging.items() if chosen[name] == "chunks"]


def on_detach(base: nn.Module, undo: list[Callable[[], Any]]) -> None:
    """Let `detach_omni` take off what was put on a prepared model later."""
    setattr(base, _UNDO, [*getattr(base, _UNDO), *(step for step in undo if step is not None)])


def detach_omni(model: Model) -> Model:
    """Take hooks, marks and replaced functions off again; sharded parameters stay sharded.

    With them stays what FSDP2 needs as long as they are: its hooks, the one that frees kept weights after a forward
    without gradients, and the mark that keeps ranks in step in `generate`. A deep copy (one rank; FSDP2 refuses to
    copy sharded parameters) is detached by itself, and the original stays prepared.

    Raises:
        ValueError: the model was not prepared.
    """
    base = hf.base_model(model)
    get_parallel_state(base)
    for step in reversed(base.__dict__.pop(_UNDO, [])):
        step()
    delattr(base, _STATE)
    return model


def gather_sequence(local: Tensor, model: nn.Module, length: int | None = None) -> Tensor:
    """[B, s, ...] of this rank, for example logits, to the full [B, S, ...] of the row they are of, without padding.

    Args:
        local: what a call of the model returned, the last one or an earlier one, or what was computed from it.
        length: S, where nothing else tells: of what was computed without gradients, if rows ran whose slices are
            equally long though the rows are not.

    Collective: one all-gather over the SP group; its backward is a reduce-scatter (sum), so a loss that every rank
    computes on the full tensor gives gradients that average to those of one rank.

    Raises:
        ValueError: the model was not prepared, `local` is no slice of a row of its calls, or of more than one length.
    """
    attachment = _attachment(model)
    return local if attachment is None else attachment.gather(local, length)


def full_output(output: Tensor, model: nn.Module, lazy: bool = True) -> Tensor:
    """[B, S, ...] of what a call of the model returned as this rank's slice; any other tensor as it is.

    Args:
        lazy: of logits that were not computed, gather the hidden states, from which each rank computes full logits
            where it looks at them; otherwise gather the logits.

    Collective: as `gather_sequence`, where `output` is a slice.
    """
    attachment = _attachment(model)
    if attachment is None or attachment.state.sp_size == 1 or not attachment.outputs.is_noted(output):
        return output
    take = partial(attachment.gather, length=attachment.outputs.length_of(output, False))
    full = output.of_tokens(take) if lazy and isinstance(output, LazyLogits) else take(output)
    attachment.outputs.note_full(full)
    return full


def _attachment(model: nn.Module) -> SequenceAttachment | None:
    base = hf.base_model(model)
    attachment: SequenceAttachment | None = getattr(base, _SEQUENCE, None)
    if attachment is None and not hasattr(base, _STATE):
        raise ValueError(f"{type(model).__name__} has no cut sequence: call `prepare_omni(model, plan)` first.")
    return attachment  # None: a family that cannot be cut, at sp_size 1, so rows are full
