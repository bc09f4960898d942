"""`run_window`: the forwards and backwards of one accumulation window, over all stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_veomni import hf
from hf_veomni.comm.agree import together
from hf_veomni.comm.gather import all_gather
from hf_veomni.context import within
from hf_veomni.data.batches import BatchRule, find_fault
from hf_veomni.fsdp import deferred_reduction, mark_stage
from hf_veomni.mesh import ENCODERS, TIED, ParallelState, Tied, get_parallel_state
from hf_veomni.pipeline.link import Link
from hf_veomni.pipeline.microbatch import MicroBatch
from hf_veomni.pipeline.schedule import Action, one_forward_one_backward
from hf_veomni.pipeline.stage import CHUNKS, Chunks
from hf_veomni.pipeline.tied import check_trained, mark_tied, tied_gradients, trained_bits

Batch = Mapping[str, Any]


def run_window(
    model: nn.Module,
    batches: Sequence[Batch],
    num_items_in_batch: Tensor | int | None = None,
    *,
    compute_loss: Callable[[int], Any] | None = None,
) -> Tensor:
    """Forward and backward of the micro-batches of one optimizer step; the gradients are there when it returns.

    With `pp_size` above 1 the micro-batches go through the stages one after the other (1F1B), and this is the way to
    train. With `pp_size` 1 it is plain gradient accumulation with the same result, so that a loop needs no two forms.

    Args:
        model: prepared, in training mode.
        batches: keyword arguments of the model, one mapping for each micro-batch; the same on all stages and on all
            ranks of an SP group, and as many on all data ranks. Rows may differ in length. More micro-batches than
            stages keep them busy.
        num_items_in_batch: targets over which the loss is the mean; None counts those of the window on all data
            ranks.
        compute_loss: in place of a call of the model, for the index of a micro-batch; on the last stage it returns
            what its backward begins with, a part of the data rank's loss. `num_items_in_batch` is not looked at then.

    Returns:
        The loss, the mean over all targets of the window: a scalar without graph, the same on all ranks. Gradients are
        those of this mean, accumulated in `.grad` as a backward does.

    Collectives: those of the model; small ones over all ranks, the stages, and the ranks of a stage; the gradient of
    tied embeddings over the two stages that have them.

    Raises:
        ValueError: no batches, faulty ones, other ones on other stages, or more on some data ranks; on every rank.
        UnsupportedError: a call that stages cannot answer.
    """
    state = get_parallel_state(model)
    with together("Reading the window"):
        _check(model, batches, own_loss=compute_loss is None)
    _compare_windows(model, batches, state)
    call = compute_loss or _calls(model, batches, num_items_in_batch, state)
    with tied_gradients(model):
        total = _run(model, [_shape(batch) for batch in batches], call, state)
    if state.world_size > 1:
        if state.plan.pp_size > 1:
            dist.broadcast(total, group=state.pp_group, group_src=state.plan.pp_size - 1)
        dist.all_reduce(total, group=state.stage_group)
        total = total / (state.dp_size * state.sp_size)
    return total


def _check(model: nn.Module, batches: Sequence[Batch], own_loss: bool) -> None:
    """What one stage alone would stumble over: ids are read by the first one, labels by the last."""
    if not batches:
        raise ValueError("`batches` ([]) must hold at least one micro-batch.")
    if not model.training:
        raise ValueError("`model` is in evaluation mode, and run_window trains it: call `model.train()` first.")
    if not torch.is_grad_enabled():
        raise ValueError("run_window runs backwards, and gradients are off: call it outside of torch.no_grad().")
    fault = find_fault(batches, BatchRule.of(hf.base_model(model), needs_labels=own_loss))
    if fault is not None:
        raise fault


def _shape(batch: Batch) -> tuple[int, ...] | None:
    """Of the rows, where the batch tells."""
    ids = batch.get("input_ids")
    return tuple(ids.shape) if isinstance(ids, Tensor) else None


def _run(
    model: nn.Module, shapes: list[tuple[int, ...] | None], call: Callable[[int], Any], state: ParallelState
) -> Tensor:
    """This stage's actions, for rows of these shapes. Returns the sum of the losses on the last stage, else zero."""
    plan, count = state.plan, len(shapes)
    chunks: Chunks | None = getattr(hf.base_model(model), CHUNKS, None)
    links = [Link(state, chunk) for chunk in range(plan.pp_stages)]
    running: dict[Action, MicroBatch] = {}
    total = torch.zeros((), dtype=torch.float64, device=state.device)
    actions = one_forward_one_backward(state.pp_rank, plan.pp_size, count, plan.pp_stages)
    following = dict(pairwise(action for action in actions if not action.backward))
    for action in actions:
        if not action.backward:
            again = _is_alike(action, following.get(action), shapes)
            batch = running[action] = MicroBatch(links[action.chunk], again)
            stage = within(stage=batch if plan.pp_size > 1 else None)
            with stage, nullcontext() if chunks is None else chunks.running(action.chunk):
                loss = call(action.index)
            if batch.is_last:
                batch.loss = loss
                total += loss.detach()
            batch.send()
        else:
            _gather_encoders(model)
            with deferred_reduction(model) if action.index + 1 < count else nullcontext():
                running.pop(action._replace(backward=False)).backward()
    for link in links:
        link.finish()
    return total.float() if next(model.parameters()).dtype != torch.float64 else total


def _is_alike(action: Action, following: Action | None, shapes: list[tuple[int, ...] | None]) -> bool:
    """Whether the rank's next forward is one of the same stage, on rows of the same shape."""
    if following is None or following.chunk != action.chunk or shapes[action.index] is None:
        return False
    return shapes[following.index] == shapes[action.index]


def _gather_encoders(model: nn.Module) -> None:
    """Before a backward of the first stage. Encoders may lie in the root's unit, which the backward before has freed.

    FSDP2 gathers it again by a hook on the model's output, and that of a stage is no part of a graph.

    Collective: an all-gather of the root's parameters over their mesh.
    """
    base: Any = hf.base_model(model)
    if getattr(base, ENCODERS, ()) and isinstance(base, FSDPModule):
        base.unshard()


def _calls(
    model: nn.Module, batches: Sequence[Batch], items: Tensor | int | None, state: ParallelState
) -> Callable[[int], Tensor | None]:
    """Calls of the model whose losses add up, over micro-batches and as a mean over data ranks, to that of the window.

    Collective, where the targets have to be counted: one all-reduce over the ranks of a stage.
    """
    if items is None:
        counted = torch.stack([_count_targets(batch).to(state.device) for batch in batches]).sum()
        if state.world_size > 1:
            dist.all_reduce(counted, group=state.stage_group)
            counted = counted // state.sp_size
        items = counted
    exact = next(model.parameters()).dtype == torch.float64
    divisor = torch.as_tensor(items, device=state.device).to(torch.float64 if exact else torch.float32) / state.dp_size

    def call(index: int) -> Tensor | None:
        batch = {k: v.to(state.device) if isinstance(v, Tensor) else v for k, v in batches[index].items()}
        return getattr(model(**batch, num_items_in_batch=divisor), "loss", None)

    return call


def _count_targets(batch: Batch) -> Tensor:
    targets = batch.get("shift_labels")
    if targets is None:
        targets = batch["labels"][..., 1:]
    return (targets != -100).sum()


def _compare_windows(model: nn.Module, batches: Sequence[Batch], state: ParallelState) -> None:
    """Collective: one all-gather of five integers over all ranks. Raises ValueError on all of them."""
    if state.world_size == 1:
        return
    ids = [batch["input_ids"] for batch in batches if isinstance(batch.get("input_ids"), Tensor)]
    flat = torch.cat([x.flatten() for x in ids]).long() if ids else torch.zeros(0, dtype=torch.long)
    mine = [len(batches), flat.numel(), sum(x.shape[-1] * i for i, x in enumerate(ids, 1))]
    sums = (flat * (torch.arange(flat.numel(), device=flat.device) % 8191 + 1)).sum()
    facts = torch.stack([*map(torch.tensor, [*mine, trained_bits(model)]), sums.cpu()]).to(state.device)
    found = all_gather(facts).view(state.plan.pp_size, state.dp_size, state.sp_size, -1)
    check_windows(found[..., [0, 1, 2, 4]])
    check_trained(model, found[:, 0, 0, 3].tolist())


def check_windows(facts: Tensor) -> None:
    """Raise ValueError where the ranks were not given the windows that belong together.

    Args:
        facts: [stages, data ranks, SP ranks, 4], of each rank's window.
    """
    for place, same in enumerate(facts.transpose(0, 1).flatten(1, 2).tolist()):
        if any(row != same[0] for row in same):
            raise ValueError(
                f"The ranks of data rank {place} were given different batches (micro-batches, tokens, lengths and "
                f"checksums {same}): its stages and the ranks of an SP group read the same ones. Read them by "
                "`get_parallel_state(model).dp_rank` of `dp_size`."
            )
    counts = facts[0, :, 0, 0].tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"`batches`: the data ranks were given {counts} micro-batches, and each must run as many as the others. "
            "Where rows have run out, give some again with `labels` of -100."
        )


def join_stages(model: nn.Module, tied: Sequence[tuple[str, ...]], state: ParallelState) -> None:
    """Tell the parameters of a cut and sharded model that others belong to them on other stages.

    Args:
        tied: names of each parameter that the first and the last stage have.

    Collective: creates process groups over all ranks, where something is tied.
    """
    base: Any = hf.base_model(model)
    found = dict(base.named_parameters(remove_duplicate=False))
    shared = [next(found[name] for name in names if name in found) for names in tied if found.keys() & set(names)]
    last = state.plan.pp_size - 1
    assert state.pp_group is not None
    mark_stage(base.parameters(), state.pp_group, shared if state.pp_rank == last else ())
    if tied:
        size = state.world_size // state.plan.pp_size
        groups: list[Any] = [dist.new_group([place, last * size + place]) for place in range(size)]
        setattr(base, TIED, Tied(tuple(tied), shared, groups[dist.get_rank() % size]))
        mark_tied(base.parameters(), state.pp_group, getattr(base, TIED))
