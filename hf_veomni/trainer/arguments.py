"""`OmniTrainingArguments`: TrainingArguments with a plan."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from inspect import get_annotations
from typing import Any, get_type_hints

import torch
from transformers import TrainingArguments

from hf_veomni.errors import UnsupportedError
from hf_veomni.hf.require import override, require_overrides
from hf_veomni.logs import warn_of_no_plan
from hf_veomni.plan import ParallelPlan, asks_auto
from hf_veomni.trainer.accelerate import OmniParallelismConfig
from hf_veomni.trainer.liger import check_liger
from hf_veomni.trainer.validation import (
    check_budgeted,
    check_faults,
    check_given,
    check_kept,
    check_saving,
    check_sharded,
    check_staged,
    check_torchao,
    release_launcher,
)

_FIELDS = "__dataclass_fields__"


@dataclass
class OmniTrainingArguments(TrainingArguments):
    """TrainingArguments + `plan`.

    With the arguments of another trainer (`@dataclass class Arguments(OmniTrainingArguments, SFTConfig)`, in any
    order) it adds its own fields alone: the other class keeps its defaults.

    Args:
        plan: how the ranks are used: a string ("sp=2,dp_shard=2"), a path to a yaml file, a mapping or a
            `ParallelPlan`. None reads what the launcher passed on, and without a launcher leaves the world to data
            parallelism. After construction it is the resolved `ParallelPlan`. "auto" takes the planner's first for
            model, training set, world and device, "auto:DEVICE" for a device by its name in the table or a yaml file;
            OmniTrainer then fills it in, and sets `activation_checkpointing` where the layout has it.
        token_budget: train on batches of at most so many tokens, of near equal cost on all data ranks in each step
            (`BalancedBatchSampler`), in place of `per_device_train_batch_size` rows. Padding is not counted: it goes
            with `OmniDataCollatorWithPacking`. Lengths come from `document_lengths` (rows of `pack_dataset`), the
            column `length_column_name`, or `input_ids`. Resumes in the middle of an epoch; `train_sampling_strategy`
            "random" and "sequential" choose the order.
        log_expert_load: add to each log how even the load of the experts was (`expert_load_max` and others; 1 is even)
            and how sure their routers were, and draw `expert_load.png` into the output directory at the end.
        log_throughput: add to each log `tokens_per_second` of all ranks, `tokens_per_second_per_device` and `mfu`: the
            model's FLOPs (`StepFlops`) over what the devices can do in bf16. No `mfu` on a device whose peak is not
            known, or for a model that cannot be counted; a warning says why. Padding, evaluation, saving and what is
            computed again count nowhere.
        step_report: measure how each step is spent on every rank (data, forward, exchange, backward, optimizer), add
            it to each log, and write `step_report.json` and the page `step_report.html` into the output directory;
            `hf-veomni doctor` says what they tell (docs/planning.md).
        router_bias_update_speed: what the bias of each expert in the router moves by after a step, up where the expert
            got fewer tokens of all ranks than the mean (DeepSeek-V3 uses 0.001). 0 leaves the bias as it is.
        sharded_weights: write the weights of checkpoints as shards, each rank what it owns, so that no rank gathers
            the model; `hf-veomni convert` makes plain files of them. None: as `async_save` says.
        async_save: stop training only while the state is copied to host memory, and write it beside training in a
            process of its own. The copy takes as many bytes as a rank's part of the weights and the optimizer's state.
        on_nonfinite: what becomes of a step whose gradient norm is NaN or infinite: "stop" raises `NotFiniteError` on
            every rank before the update, naming rank, module and batch; "skip" leaves the update out, with a warning
            that names the same; "ignore" makes the update, as Trainer does.
        stall_timeout: seconds that a part of a step (reading its batches, a micro-batch, the update) may take on a
            rank, unless ten times the longest so far is more, before every rank ends with an error that names the rank
            and the line. 0: no watchdog.
        wait_timeout: the same for what has no such limit, loading, the first steps, compilations, evaluation, saving
            and callbacks: seconds that another rank may wait there for one that does not come. It must be longer than
            one rank keeps the others waiting, as rank 0 does while it writes. None: `ddp_timeout`.
        enable_jit_checkpoint: Trainer's, for all ranks together and for SIGUSR1 too: a signal to any rank lets all
            save after the next step and exit with code 75 (docs/faults.md).

    Raises:
        ValueError: a plan that does not fit the world, an argument that cannot be combined with a plan, or a class
            without `@dataclass` on several classes of arguments.
    """

    # A string for HfArgumentParser; `__post_init__` parses it.
    plan: str | None = field(
        default=None,
        metadata={
            "help": "Parallel plan: 'sp=2,dp_shard=2', a path to a yaml file, or 'auto'. Default: what the launcher "
            "passed on."
        },
    )

    token_budget: int | None = field(
        default=None,
        metadata={"help": "Tokens of a training batch, in place of a number of rows; near equal cost on all ranks."},
    )

    log_expert_load: bool = field(
        default=False, metadata={"help": "Log how even the load of the experts is; draw it at the end."}
    )
    log_throughput: bool = field(
        default=False, metadata={"help": "Log tokens a second and the share of the devices' peak (MFU)."}
    )
    step_report: bool = field(
        default=False, metadata={"help": "Measure and report how each step is spent; see `hf-veomni doctor`."}
    )
    router_bias_update_speed: float = field(
        default=0.0, metadata={"help": "Step of the router's balancing bias after each optimizer step. 0: none."}
    )

    sharded_weights: bool | None = field(
        default=None, metadata={"help": "Write the weights of checkpoints as shards. Default: as `async_save` says."}
    )
    async_save: bool = field(
        default=False, metadata={"help": "Write checkpoints beside training; it stops for a copy to memory alone."}
    )

    on_nonfinite: str = field(
        default="stop", metadata={"help": "A gradient that is not finite: 'stop', 'skip' its step, or 'ignore' it."}
    )
    stall_timeout: float = field(
        default=60.0, metadata={"help": "Seconds that a rank may stand still before all end. 0: no limit."}
    )
    wait_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds to wait for a rank while loading, evaluating or saving. Default: `ddp_timeout`."},
    )

    def __init_subclass__(cls, **kwargs: object) -> None:
        """`dataclass` takes a field from the first base that has it, be it inherited. What we inherited from
        TrainingArguments hides nothing: a field that another base declares is declared again in `cls`."""
        super().__init_subclass__(**kwargs)
        declared: dict[str, Any] = {}
        for name, stock in vars(TrainingArguments)[_FIELDS].items():
            found = [(base, vars(base).get(_FIELDS, {}).get(name, stock)) for base in cls.__mro__[1:]]
            owner, own = next(((base, other) for base, other in found if other is not stock), (None, None))
            if own is not None and name not in get_annotations(cls):
                declared[name] = get_type_hints(owner)[name] if isinstance(own.type, str) else own.type
                setattr(cls, name, copy(own))
        cls.__annotations__ = declared | get_annotations(cls)

    @override
    def __post_init__(self) -> None:
        self._check_decorated()
        auto = asks_auto(self.plan)
        plan = ParallelPlan.parse((ParallelPlan() if auto else self.plan) or None)
        unplanned = self.plan is None and plan == ParallelPlan()
        check_given(self)
        given = self.parallelism_config
        if given is not None and not isinstance(given, OmniParallelismConfig):
            raise UnsupportedError(
                f"`parallelism_config` ({type(given).__name__}) cannot be combined with a plan: leave it out."
            )
        release_launcher(plan)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate starts every process as if it were alone
        super().__post_init__()
        check_liger(self)
        check_torchao(self)
        self._n_gpu = min(self._n_gpu, 1)  # one process drives one device: no DataParallel
        check_budgeted(self)
        check_saving(self)
        check_faults(self)
        self.sharded_weights = self.async_save if self.sharded_weights is None else self.sharded_weights
        if not auto:
            self.settle_plan(plan)
        if unplanned:
            warn_of_no_plan(self.world_size)
        loaders: Any = self.accelerator_config
        if loaders.dispatch_batches is None:
            # accelerate's default for streams: rank 0 reads, concatenates and cuts. Packed sequences do not add up,
            # and even one rank would cut the patches of a row's images to as many as it has rows.
            loaders.dispatch_batches = False
        if self.world_size > 1:
            check_sharded(self)

    def settle_plan(self, plan: ParallelPlan) -> None:
        """Take a plan for the world that there is.

        Raises:
            ValueError: it does not fit.
        """
        parsed: Any = plan.resolve(self.world_size)
        self.plan = parsed
        check_staged(self, parsed)
        check_kept(self, parsed)
        if parsed.world_size > 1:
            self.parallelism_config = OmniParallelismConfig(parsed)

    def _check_decorated(self) -> None:
        made, *rest = [base for base in type(self).__mro__ if _FIELDS in vars(base)]
        left_out = [base.__name__ for base in rest if not issubclass(made, base)]
        if left_out:
            raise ValueError(
                f"{type(self).__name__} inherits from {made.__name__} and {left_out[0]} without being a dataclass, so "
                f"the fields of {left_out[0]} would be lost: put `@dataclass` before the class."
            )

    @override
    def to_dict(self) -> dict[str, Any]:
        """As in TrainingArguments: plain values, the plan included. What follows from the plan is left out."""
        values = super().to_dict()
        plan: Any = self.plan
        values["plan"] = plan if asks_auto(plan) else plan.to_dict()
        values["parallelism_config"] = None
        return values


require_overrides(OmniTrainingArguments)
