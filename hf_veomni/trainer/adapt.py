"""Methods of one Accelerator that must know the plan, replaced on the instance.

Gathering goes over the data ranks: the ranks of an SP group hold the same rows, which must count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn

from hf_veomni.checkpoint import (
    gather_full_state,
    load_optimizer,
    load_weights,
    save_optimizer,
    save_weights,
    unwrap_optimizer,
)
from hf_veomni.comm import all_gather
from hf_veomni.expert import counts_tokens
from hf_veomni.fsdp import check_not_replaced, check_optimizer, deferred_reduction
from hf_veomni.fsdp import clip_grad_norm_ as clip_over_meshes
from hf_veomni.hf.require import override, require_overrides
from hf_veomni.mesh import is_prepared
from hf_veomni.pipeline import check_tied_groups
from hf_veomni.plan import ParallelPlan
from hf_veomni.trainer.counting import count_data_ranks, counting_within_stage
from hf_veomni.trainer.loaders import assign_to_data_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator


class _PlanScheduler(AcceleratedScheduler):
    """accelerate steps a scheduler once for every process; the ranks of an SP group are one reader of the data."""

    data_ranks = 1

    @override
    def step(self, *args: object, **kwargs: object) -> None:
        # With `split_batches` set the stock method makes one step, after all its checks.
        stepping = self.step_with_optimizer and self.gradient_state.sync_gradients
        for _ in range(self.data_ranks if stepping else 1):
            total = getattr(self.scheduler, "total_steps", None)
            if total is None or self.scheduler._step_count <= total:
                super().step(*args, **kwargs)


require_overrides(_PlanScheduler)


def adapt_accelerator(accelerator: Accelerator, plan: ParallelPlan, group: dist.ProcessGroup | None) -> None:
    """Make one Accelerator count rows once and handle parameters that the plan sharded.

    Args:
        plan: resolved.
        group: one rank of each SP group, in data-rank order; None if there is one data rank.
    """
    if plan.world_size == 1:
        return
    methods: Any = accelerator
    count_data_ranks(accelerator, plan)
    _adapt_gathering(methods, group)
    _adapt_training(methods, plan)
    _adapt_saving(methods)


def _adapt_gathering(accelerator: Any, group: dist.ProcessGroup | None) -> None:
    def gather(tensor: object) -> Any:
        return gather_rows(tensor, group)

    def gather_for_metrics(input_data: Any, use_gather_object: bool = False) -> Any:
        tensors: list[Tensor] = []
        recursively_apply(tensors.append, input_data)
        use_gather_object = use_gather_object or not tensors
        data = gather_objects(input_data, group) if use_gather_object else gather_rows(input_data, group)
        state = accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return data
        if use_gather_object:
            return data[: state.remainder]
        return recursively_apply(lambda rows: rows[: state.remainder], data)

    def reduce(tensor: object, reduction: str = "sum", scale: float = 1.0) -> Any:
        return reduce_rows(tensor, reduction, group)  # accelerate reads `scale` on XLA alone

    accelerator.gather, accelerator.gather_for_metrics, accelerator.reduce = gather, gather_for_metrics, reduce


def _adapt_training(accelerator: Any, plan: ParallelPlan) -> None:
    stock_model, stock_scheduler = accelerator.prepare_model, accelerator.prepare_scheduler
    stock_optimizer = accelerator.prepare_optimizer

    def assigning(stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def make_loader(*args: Any, **kwargs: Any) -> Any:
            with counting_within_stage(accelerator, plan):
                loader = stock(*args, **kwargs)
                assign_to_data_ranks(loader, plan.dp_size, accelerator.process_index // plan.sp_size)
            return loader

        return make_loader

    @wraps(stock_model)
    def prepare_model(
        model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        if not is_prepared(model) and any(p.requires_grad for p in model.parameters()) and not evaluation_mode:
            raise ValueError(
                f"{type(model).__name__} is not prepared for the plan ({plan}): pass `prepare_omni(model, plan)`."
            )
        # Already sharded and placed: what is left for accelerate is autocast.
        return stock_model(model, device_placement=not is_prepared(model), evaluation_mode=True)

    @wraps(accelerator.clip_grad_norm_)
    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        accelerator.unscale_gradients()
        return clip_over_meshes(parameters, max_norm, norm_type)

    @wraps(stock_optimizer)
    def prepare_optimizer(optimizer: Any, device_placement: bool | None = None) -> Any:
        check_not_replaced(optimizer.param_groups)
        check_optimizer(unwrap_optimizer(optimizer))
        check_tied_groups(optimizer.param_groups)
        return stock_optimizer(optimizer, device_placement)

    @wraps(stock_scheduler)
    def prepare_scheduler(scheduler: object) -> Any:
        check_not_replaced(unwrap_optimizer(scheduler).param_groups)
        prepared = stock_scheduler(scheduler)
        if not prepared.split_batches:
            prepared.__class__, prepared.split_batches, prepared.data_ranks = _PlanScheduler, True, plan.dp_size
        return prepared

    accelerator.prepare_model, accelerator.clip_grad_norm_ = prepare_model, clip_grad_norm_
    accelerator.prepare_scheduler, accelerator.prepare_optimizer = prepare_scheduler, prepare_optimizer
    accelerator.prepare_data_loader = assigning(accelerator.prepare_data_loader)
    accelerator.skip_first_batches = assigning(accelerator.skip_first_batches)  # which makes another loader
    accelerator.no_sync = lambda model: deferred_reduction(model) if is_prepared(model) else nullcontext()


def _optimizer_model(optimizer: Any, models: list[nn.Module]) -> nn.Module:
    owned = {id(p) for group in unwrap_optimizer(optimizer).param_groups for p in group["params"]}
    for model in models:
        if any(id(p) in owned for p in model.parameters()):
            return model
    raise ValueError(
        f"{type(unwrap_optimizer(optimizer)).__name__} trains none of the prepared models' parameters: make it after "
        "`prepare_omni`, which replaces them."
    )


def _adapt_saving(accelerator: Any) -> None:
    stock_save, stock_load, stock_state = accelerator.save_state, accelerator.load_state, accelerator.get_state_dict

    @wraps(stock_state)
    def get_state_dict(model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """Full tensors on the main process, an empty dict elsewhere. Every rank must call it."""
        if not is_prepared(model):
            return stock_state(model, unwrap)
        return gather_full_state(model, keep=accelerator.is_main_process)

    @contextmanager
    def without_models(register: Callable[[Any], Any]) -> Iterator[list[str]]:
        """Keep accelerate's own files (schedulers, loaders, random states), and learn the directory it chose."""
        chosen: list[str] = []
        optimizers = accelerator._optimizers
        accelerator._optimizers = []
        accelerator.get_state_dict = lambda model, unwrap=True: {}

        def hook(models: list[Any], *rest: Any) -> None:
            chosen.append(rest[-1])
            models_or_weights = rest[0] if len(rest) == 2 else models
            models_or_weights.clear()

        handle = register(hook)
        try:
            yield chosen
        finally:
            handle.remove()
            accelerator._optimizers, accelerator.get_state_dict = optimizers, get_state_dict

    @wraps(stock_save)
    def save_state(output_dir: str | None = None, safe_serialization: bool = True, **kwargs: Any) -> Any:
        with without_models(accelerator.register_save_state_pre_hook) as chosen:
            result = stock_save(output_dir, safe_serialization, **kwargs)
        for index, model in enumerate(accelerator._models):
            save_weights(model, Path(chosen[0]) / f"omni_model_{index}")
        for index, optimizer in enumerate(accelerator._optimizers):
            owner = _optimizer_model(optimizer, accelerator._models)
            save_optimizer(owner, optimizer, Path(chosen[0]) / f"omni_optimizer_{index}")
        return result

    @wraps(stock_load)
    def load_state(input_dir: str | None = None, load_kwargs: dict | None = None, **kwargs: Any) -> None:
        with without_models(accelerator.register_load_state_pre_hook) as chosen:
            stock_load(input_dir, load_kwargs, **kwargs)
        for index, model in enumerate(accelerator._models):
            load_weights(model, Path(chosen[0]) / f"omni_model_{index}")
        for index, optimizer in enumerate(accelerator._optimizers):
            owner = _optimizer_model(optimizer, accelerator._models)
            load_optimizer(owner, optimizer, Path(chosen[0]) / f"omni_optimizer_{index}")

    accelerator.get_state_dict, accelerator.save_state, accelerator.load_state = get_state_dict, save_state, load_state


def gather_rows(data: Any, group: dist.ProcessGroup | None) -> Any:
    """Concatenate the rows of all data ranks, in data-rank order, for each tensor in a nested structure.

    Args:
        data: tensors [b, ...], alike in all but the first size (the last batch of an epoch may be short); a scalar
            counts as one row. In the loss of a batch that only keeps its rank in step (`counting_no_tokens`) they are
            none; if it is so on all ranks, they count.
        group: one rank of each SP group; None if there is one data rank.

    Returns:
        Tensors [sum of b, ...], the same on every rank.

    Collectives: two all-gathers over `group` for each tensor. No gradient.
    """
    return recursively_apply(_gather_one, data, group, error_on_other_type=True)


def _gather_one(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    rows = tensor.detach().clone()[None] if tensor.dim() == 0 else tensor.detach().contiguous()
    if group is None:
        return rows
    size = rows.shape[0]
    sizes = all_gather(rows.new_tensor([[size, size * counts_tokens()]], dtype=torch.long), group)
    longest = int(sizes[:, 0].max())
    counts: list[int] = sizes[:, int(sizes[:, 1].any())].tolist()
    if rows.shape[0] < longest:
        rows = torch.cat([rows, rows.new_zeros(longest - rows.shape[0], *rows.shape[1:])])
    as_bytes = rows.dtype == torch.bool  # gloo has no bool
    sent = rows.view(torch.uint8) if as_bytes else rows
    out = all_gather(sent, group)
    out = out.view(torch.bool) if as_bytes else out
    if set(counts) == {longest}:
        return out
    return torch.cat([part[:count] for part, count in zip(out.split(longest), counts, strict=True)])


def reduce_rows(data: object, reduction: str, group: dist.ProcessGroup | None) -> Any:
    """Reduce each tensor in a nested structure over the data ranks.

    Args:
        reduction: "sum", "mean", "max", or "none", which leaves the tensors as they are. What a rank computes in the
            loss of a batch that only keeps it in step does not count, as in `gather_rows`.
        group: one rank of each SP group; None if there is one data rank.

    Returns:
        New tensors of the same shapes, the same on every rank but for "none".

    Collectives: two all-reduces over `group` for each tensor, the first of one number. No gradient.

    Raises:
        ValueError: another reduction.
    """
    if reduction not in ("sum", "mean", "max", "none"):
        raise ValueError(f"`reduction` ({reduction!r}) must be 'sum', 'mean', 'max' or 'none'.")
    return recursively_apply(_reduce_one, data, reduction, group, error_on_other_type=True)


def _reduce_one(tensor: Tensor, reduction: str, group: dist.ProcessGroup | None) -> Tensor:
    reduced = tensor.detach().clone()
    if group is None or reduction == "none":
        return reduced
    counted = torch.tensor(int(counts_tokens()), device=tensor.device)
    dist.all_reduce(counted, group=group)
    if not counts_tokens() and counted:
        lowest = -torch.inf if reduced.is_floating_point() else torch.iinfo(reduced.dtype).min
        reduced.fill_(lowest if reduction == "max" else 0)
    dist.all_reduce(reduced, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM, group=group)
    return reduced / (counted or dist.get_world_size(group)) if reduction == "mean" else reduced


def gather_objects(data: list[Any], group: dist.ProcessGroup | None) -> list[Any]:
    """The lists of all data ranks as one list, in data-rank order; which of them count is as in `gather_rows`.

    Collective: one all-gather of pickled objects over `group`.
    """
    if group is None:
        return list(data)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (counts_tokens(), data), group=group)
    counted = [part for counts, part in found if counts] or [part for _, part in found]
    return [entry for part in counted for entry in part]
