"""Training arguments that cannot be combined with a plan, and what a launcher exported.

An option without effect is an error, with the way out. The one stock yaml that carries a plan needs
`distributed_type: FSDP`, so its launcher exports switches by which accelerate would build a ParallelismConfig of its
own (which rejects our string) and, on a GPU, wrap the model a second time. They are compared with the plan, which owns
both jobs, and then taken out of the way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_torchao_available

from hf_veomni.errors import UnsupportedError
from hf_veomni.plan import ACCELERATE_ENV_VARIABLE, ACCELERATE_PREFIX, ParallelPlan, nearest

# Optimizers whose update of an element needs no other element of the parameter, or that are torch's own on DTensors;
# of torchao's it needs the block of the shard that the element is in.
_SHARDED_OPTIMIZERS = frozenset(
    {
        OptimizerNames.ADAMW_TORCH,
        OptimizerNames.ADAMW_TORCH_FUSED,
        OptimizerNames.ADAMW_TORCH_4BIT,
        OptimizerNames.ADAMW_TORCH_8BIT,
        OptimizerNames.SGD,
        OptimizerNames.ADAGRAD,
        OptimizerNames.RMSPROP,
        OptimizerNames.SCHEDULE_FREE_ADAMW,
        OptimizerNames.SCHEDULE_FREE_SGD,
    }
)
# Those of torchao, which are known for their few bits.
_LOW_BIT = frozenset({OptimizerNames.ADAMW_TORCH_4BIT, OptimizerNames.ADAMW_TORCH_8BIT})
_BITSANDBYTES = frozenset(
    one
    for one in OptimizerNames
    if one.value.startswith(("paged_", "lion_", "rmsprop_bnb"))
    or one.value in ("adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit")
)

POLICIES = ("stop", "skip", "ignore")  # of `on_nonfinite`


@dataclass(frozen=True)
class Refusal:
    """One argument: `refused(value)` tells whether the value is refused, `reason` why and the way out."""

    name: str
    refused: Callable[[Any], bool]
    reason: str

    def check(self, arguments: object, owner: str = "a plan") -> None:
        """Raise UnsupportedError if these arguments hold what is refused."""
        value = getattr(arguments, self.name, None)
        if self.refused(value):
            shown = getattr(value, "value", value)
            raise UnsupportedError(f"`{self.name}` ({shown!r}) cannot be combined with {owner}: {self.reason}.")


def _given(value: object) -> bool:
    return value is not None


def _falsy(value: object) -> bool:
    return not value


# Whatever the plan is, one rank included.
_ALWAYS = (
    *(
        Refusal(name, bool, f"the plan shards the model; leave `{name}` out and give `plan='dp_shard=N'`")
        for name in ("fsdp", "deepspeed")
    ),
    Refusal("fsdp_config", bool, "the plan shards the model; leave it out, per-module rules go into the plan"),
)

# A world of several ranks.
_SHARDED = (
    Refusal("fp16", bool, "the gradient scaler cannot see infinities on other ranks' shards; use `bf16=True`"),
    Refusal("fp16_full_eval", bool, "sharded parameters cannot change their dtype; load the model in bfloat16"),
    Refusal("auto_find_batch_size", bool, "ranks that run out of memory alone would leave the others waiting; set it"),
    Refusal("save_on_each_node", bool, "rank 0 alone writes; save to a directory that all nodes share"),
    Refusal(
        "average_tokens_across_devices", _falsy, "the loss is normalised by the tokens of all ranks; leave it at True"
    ),
    *(
        Refusal(f"ddp_{name}", _given, "FSDP2 is used, not DDP; leave it out")
        for name in ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph")
    ),
    Refusal(
        "optim",
        lambda value: value in _BITSANDBYTES,
        "the kernels of bitsandbytes take full parameters, and each rank holds a shard; use "
        f"{OptimizerNames.ADAMW_TORCH_8BIT.value}, AdamW with 8 bits for each moment from torchao",
    ),
    Refusal(
        "optim",
        lambda value: value not in _SHARDED_OPTIMIZERS,
        f"it does not work on sharded parameters; use {', '.join(sorted(o.value for o in _SHARDED_OPTIMIZERS))}, or "
        "pass one in `optimizer_cls_and_kwargs`",
    ),
    Refusal(
        "activation_checkpointing_kwargs",
        lambda value: bool(value and value.get("use_reentrant")),
        "reentrant checkpointing runs FSDP's hooks in the wrong order; leave `use_reentrant` out or False",
    ),
)

# A plan with pipeline stages.
_STAGED = (
    Refusal("torch_compile", bool, "layers of other stages would be compiled too; leave it out"),
    *(
        Refusal(name, bool, "it is measured on full models; leave it out")
        for name in ("log_throughput", "step_report", "token_budget")
    ),
)

# With several stages on a rank.
_CHUNKED = tuple(
    Refusal(name, bool, "layers are counted in the order of the ranks; give each rank one stage")
    for name in ("log_expert_load", "router_bias_update_speed")
)

_LOADERS = (
    Refusal("split_batches", bool, "each data rank reads batches of its own; give the batch size per device"),
    Refusal("dispatch_batches", bool, "rank 0 cannot cut packed sequences of different lengths; leave it out"),
    Refusal("even_batches", _falsy, "every rank must run the same number of batches; leave it at True"),
)


# Beside `token_budget`.
_BUDGETED = (
    Refusal(
        "train_sampling_strategy",
        lambda value: value not in ("random", "sequential"),
        "the budget's batches have near equal cost already; leave it out, or 'sequential' to keep the order",
    ),
    Refusal(
        "per_device_train_batch_size",
        lambda value: value not in (1, 8),  # Trainer's default, and what goes with packed sequences
        "the budget says how many rows a batch has; leave it out",
    ),
)


def check_given(arguments: object) -> None:
    """Refuse what no plan goes with. Raises UnsupportedError that names the argument, its value and the way out."""
    for refusal in _ALWAYS:
        refusal.check(arguments)


def check_torchao(arguments: Any) -> None:
    """Refuse an optimizer of torchao where that is not installed. Raises UnsupportedError."""
    if arguments.optim in _LOW_BIT and not is_torchao_available():
        raise UnsupportedError(
            f"`optim` ({OptimizerNames(arguments.optim).value!r}) needs the package torchao, which is not installed: "
            "`pip install 'hf-veomni[torchao]'`, or use adamw_torch_fused."
        )


def check_sharded(arguments: Any) -> None:
    """Refuse what a world of several ranks cannot be combined with. Raises UnsupportedError as `check_given` does."""
    for refusal in _SHARDED:
        refusal.check(arguments)
    for refusal in _LOADERS:
        refusal.check(arguments.accelerator_config)


def check_staged(arguments: Any, plan: ParallelPlan) -> None:
    """Refuse what pipeline stages cannot be combined with. Raises UnsupportedError as `check_given` does."""
    for refusal in _STAGED if plan.pp_size > 1 else ():
        refusal.check(arguments, f"`pp_size` ({plan.pp_size})")
    for refusal in _CHUNKED if plan.pp_stages > 1 else ():
        refusal.check(arguments, f"`pp_stages` ({plan.pp_stages})")


def check_kept(arguments: Any, plan: ParallelPlan) -> None:
    """Refuse a rule of the plan for activation checkpointing that is off. Raises ValueError."""
    if plan.says("checkpointing") and not (arguments.activation_checkpointing or arguments.gradient_checkpointing):
        pattern = next(pattern for pattern, rules in plan.modules.items() if "checkpointing" in rules)
        raise ValueError(
            f"The rule `checkpointing` ('keep') for {pattern!r} has no effect without activation checkpointing: set "
            "`activation_checkpointing=True`, or leave the rule out."
        )


def check_budgeted(arguments: Any) -> None:
    """Refuse what `token_budget`, if it is given, cannot be combined with. Raises ValueError as `check_given` does."""
    budget = arguments.token_budget
    if budget is None:
        return
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise ValueError(f"`token_budget` ({budget!r}) must be a positive number of tokens, or None.")
    for refusal in _BUDGETED:
        refusal.check(arguments, f"`token_budget` ({budget})")


def check_saving(arguments: Any) -> None:
    """Refuse what `sharded_weights` and `async_save` cannot be combined with. Raises ValueError as `check_given`."""
    if arguments.async_save and arguments.sharded_weights is False:
        raise ValueError(
            "`async_save` (True) writes each rank's shards beside training, and `sharded_weights` (False) asks for "
            "gathered weights: leave `sharded_weights` out, and make plain files with `hf-veomni convert`."
        )
    for name in ("async_save", "sharded_weights"):
        if getattr(arguments, name):
            reason = "shards are no model for the Hub; push what `hf-veomni convert` makes"
            Refusal("push_to_hub", bool, reason).check(arguments, f"`{name}`")
    if arguments.async_save and not hasattr(os, "memfd_create"):
        raise UnsupportedError("`async_save` (True) needs memory that processes share, as Linux has: leave it out.")


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def check_faults(arguments: Any) -> None:
    """Refuse what `on_nonfinite`, the limits and `enable_jit_checkpoint` cannot be. Raises ValueError."""
    if arguments.on_nonfinite not in POLICIES:
        hint = nearest(str(arguments.on_nonfinite), POLICIES)
        raise ValueError(f"`on_nonfinite` ({arguments.on_nonfinite!r}) is unknown: {hint}.")
    limit = arguments.stall_timeout
    if not _is_time(limit):
        raise ValueError(f"`stall_timeout` ({limit!r}) must be a number of seconds, or 0 for no limit.")
    wait, most = arguments.wait_timeout, arguments.ddp_timeout
    if wait is not None and not (_is_time(wait) and 0 < limit <= wait <= most):
        raise ValueError(
            f"`wait_timeout` ({wait!r}) must be a number of seconds from `stall_timeout` ({limit:g}, which is not 0 "
            f"then) to `ddp_timeout` ({most}), where torch itself waits no longer; or None for that."
        )
    if arguments.enable_jit_checkpoint:
        reason = "training could not go on from the checkpoint that a signal asks for; leave one of them out"
        Refusal("save_only_model", bool, reason).check(arguments, "`enable_jit_checkpoint`")


# Switches that would put a second owner on the model. `transformers` reads the last one in `from_pretrained`, where it
# leaves every rank but the first without weights.
_RELEASED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG", "FSDP_CPU_RAM_EFFICIENT_LOADING")

_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed shards the model itself: use `distributed_type: FSDP` with the plan",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM has a model of its own: use `distributed_type: FSDP` with the plan",
    "FSDP_OFFLOAD_PARAMS": "parameter offload is not available under a plan: drop `fsdp_offload_params`, and raise "
    "dp_shard or sp to fit the model",
    "FSDP_ACTIVATION_CHECKPOINTING": "use `activation_checkpointing=True` in the training arguments in place of "
    "`fsdp_activation_checkpointing`",
}

_SIZES = {
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "dp_replicate_size",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "dp_shard_size",
    "PARALLELISM_CONFIG_SP_SIZE": "sp_size",
    "PARALLELISM_CONFIG_TP_SIZE": None,
    "PARALLELISM_CONFIG_CP_SIZE": None,
}


def _check_sizes(plan: ParallelPlan) -> None:
    """A size in the yaml that says something else than the plan would be an option without effect."""
    for variable, name in _SIZES.items():
        size = int(os.environ.get(variable, "1"))
        expected = getattr(plan, name) if name else 1
        if size not in (1, expected) and expected is not None:
            key = variable.lower()
            raise ValueError(
                f"`{key}` ({size}) in the launcher's yaml differs from the plan ({plan}): leave it out and put every "
                f'size into `parallelism_config_sp_backend: "{ACCELERATE_PREFIX}..."`.'
            )


def _check_backend(plan: ParallelPlan) -> None:
    backend = os.environ.get(ACCELERATE_ENV_VARIABLE, "")
    if backend in ("", "deepspeed", "None"):
        return
    if not backend.startswith(ACCELERATE_PREFIX):
        raise ValueError(
            f"`parallelism_config_sp_backend` ({backend!r}) in the launcher's yaml must be 'deepspeed' or start with "
            f"'{ACCELERATE_PREFIX}', as in '{ACCELERATE_PREFIX}sp=2,dp_shard=2'."
        )
    launched = ParallelPlan.from_string(backend.removeprefix(ACCELERATE_PREFIX))
    if plan.dp_shard_size is not None:
        launched = launched.resolve(plan.world_size)
    if launched != plan:
        raise ValueError(
            f"`plan` ({plan}) differs from the plan in the launcher's yaml ({launched}): give it in one place."
        )


def release_launcher(plan: ParallelPlan) -> None:
    """Check what the launcher exported against `plan` and clear the switches that name another owner of the model.

    Args:
        plan: the plan as the user gave it, or resolved.

    Raises:
        ValueError: the launcher asks for something that the plan does not do, or for another plan.
    """
    for variable, reason in _REFUSED.items():
        if os.environ.get(variable, "").lower() == "true":
            raise UnsupportedError(
                f"{variable}=true, exported by the launcher, cannot be combined with a plan: {reason}."
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise UnsupportedError(
            f"`dynamo_backend` ({backend}) in the launcher's yaml is not available under a plan: the sequence is cut "
            "by hooks that torch.compile does not trace. Set it to 'no'."
        )
    _check_backend(plan)
    _check_sizes(plan)
    for variable in _RELEASED:
        os.environ.pop(variable, None)
