"""Methods of one Accelerator that must know the plan, replaced on the instance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_veomni import hf
from hf_veomni.checkpoint import (
    gather_full_state,
    load_optimizer,
    load_weights,
    save_optimizer,
    save_weights,
    unwrap_optimizer,
)
from hf_veomni.fsdp import check_not_replaced
from hf_veomni.hf.require import override, require_overrides
from hf_veomni.mesh import get_parallel_state
from hf_veomni.plan import ParallelPlan
from hf_veomni.trainer.counting import count_data_ranks
from hf_veomni.trainer.gathering import gather_objects, gather_rows, reduce_rows
from hf_veomni.trainer.loaders import deal_to_data_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare_omni` was called on the model."""
    try:
        get_parallel_state(model)
    except ValueError:
        return False
    return True


@contextmanager
def deferred_reduction(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients over micro-batches with as little communication as memory allows.

    Gradients that no rank has reduced are as large as the parameters they belong to. A few of them (LoRA) wait whole
    for the last micro-batch. All of them would cost what sharding saved, so a full fine-tune reduce-scatters every
    time and puts off only the all-reduce over the replicas. The sums are the same.
    """
    root = hf.base_model(model)
    if not isinstance(root, FSDPModule):
        yield
        return
    sizes = [(p.numel(), p.requires_grad) for p in root.parameters()]
    few = 4 * sum(n for n, trained in sizes if trained) <= sum(n for n, _ in sizes)
    switch: Callable[[bool], None] = root.set_requires_gradient_sync if few else root.set_requires_all_reduce
    switch(False)
    try:
        yield
    finally:
        switch(True)


class _PlanScheduler(AcceleratedScheduler):
    """accelerate steps a scheduler once for every process; the ranks of an SP group are one reader of the data."""

    data_ranks = 1

    @override
    def step(self, *args: Any, **kwargs: Any) -> None:
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
    def gather(tensor: Any) -> Any:
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

    def reduce(tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        return reduce_rows(tensor, reduction, group)  # accelerate reads `scale` on XLA alone

    accelerator.gather, accelerator.gather_for_metrics, accelerator.reduce = gather, gather_for_metrics, reduce


def _adapt_training(accelerator: Any, plan: ParallelPlan) -> None:
    stock_model, stock_clip = accelerator.prepare_model, accelerator.clip_grad_norm_
    stock_scheduler, stock_optimizer = accelerator.prepare_scheduler, accelerator.prepare_optimizer

    def dealing(stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def make_loader(*args: Any, **kwargs: Any) -> Any:
            loader = stock(*args, **kwargs)
            deal_to_data_ranks(loader, plan.dp_size, accelerator.process_index // plan.sp_size)
            return loader

        return make_loader

    @wraps(stock_model)
    def prepare_model(
        model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        if not is_prepared(model) and any(p.requires_grad for p in model.parameters()) and not evaluation_mode:
            raise ValueError(
                f"{type(model).__name__} is not prepared for the plan ({plan}): hand over `prepare_omni(model, plan)`."
            )
        # Already sharded and placed: what is left for accelerate is autocast.
        return stock_model(model, device_placement=not is_prepared(model), evaluation_mode=True)

    @wraps(stock_clip)
    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        norm = stock_clip(parameters, max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @wraps(stock_optimizer)
    def prepare_optimizer(optimizer: Any, device_placement: bool | None = None) -> Any:
        check_not_replaced(optimizer.param_groups)
        return stock_optimizer(optimizer, device_placement)

    @wraps(stock_scheduler)
    def prepare_scheduler(scheduler: Any) -> Any:
        check_not_replaced(unwrap_optimizer(scheduler).param_groups)
        prepared = stock_scheduler(scheduler)
        if not prepared.split_batches:
            prepared.__class__, prepared.split_batches, prepared.data_ranks = _PlanScheduler, True, plan.dp_size
        return prepared

    accelerator.prepare_model, accelerator.clip_grad_norm_ = prepare_model, clip_grad_norm_
    accelerator.prepare_scheduler, accelerator.prepare_optimizer = prepare_scheduler, prepare_optimizer
    accelerator.prepare_data_loader = dealing(accelerator.prepare_data_loader)
    accelerator.skip_first_batches = dealing(accelerator.skip_first_batches)  # which makes another loader
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
