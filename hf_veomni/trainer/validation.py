"""Training arguments that do not go with a plan. An option without effect is an error, with the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.training_args import OptimizerNames

from hf_veomni.errors import UnsupportedError

# Optimizers whose update of an element needs no other element of the parameter, or that are torch's own on DTensors.
_SHARDED_OPTIMIZERS = frozenset(
    {
        OptimizerNames.ADAMW_TORCH,
        OptimizerNames.ADAMW_TORCH_FUSED,
        OptimizerNames.SGD,
        OptimizerNames.ADAGRAD,
        OptimizerNames.RMSPROP,
        OptimizerNames.SCHEDULE_FREE_ADAMW,
        OptimizerNames.SCHEDULE_FREE_SGD,
    }
)


@dataclass(frozen=True)
class Refusal:
    """One argument: `refused(value)` tells whether the value is refused, `reason` why and the way out."""

    name: str
    refused: Callable[[Any], bool]
    reason: str

    def check(self, arguments: Any, owner: str = "a plan") -> None:
        value = getattr(arguments, self.name, None)
        if self.refused(value):
            shown = getattr(value, "value", value)
            raise UnsupportedError(f"`{self.name}` ({shown!r}) does not go with {owner}: {self.reason}.")


def _given(value: Any) -> bool:
    return value is not None


def _falsy(value: Any) -> bool:
    return not value


# Whatever the plan is, one rank included.
_ALWAYS = (
    *(
        Refusal(name, bool, f"the plan shards the model; leave `{name}` out and give `plan='dp_shard=N'`")
        for name in ("fsdp", "deepspeed")
    ),
    Refusal("fsdp_config", bool, "the plan shards the model; leave it out, per-module rules go into the plan"),
    Refusal("use_liger_kernel", bool, "the loss runs without full logits already; leave `use_liger_kernel` off"),
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
        lambda value: value not in _SHARDED_OPTIMIZERS,
        f"it does not work on sharded parameters; use {', '.join(sorted(o.value for o in _SHARDED_OPTIMIZERS))}, or "
        "hand one over in `optimizer_cls_and_kwargs`",
    ),
    Refusal(
        "activation_checkpointing_kwargs",
        lambda value: bool(value and value.get("use_reentrant")),
        "reentrant checkpointing runs FSDP's hooks in the wrong order; leave `use_reentrant` out or False",
    ),
)

_LOADERS = (
    Refusal("split_batches", bool, "each data rank reads batches of its own; give the batch size per device"),
    Refusal("dispatch_batches", bool, "rank 0 cannot cut packed rows of different lengths; leave it out"),
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
        lambda value: value not in (1, 8),  # Trainer's default, and what goes with packed rows
        "the budget says how many rows a batch has; leave it out",
    ),
)


def check_given(arguments: Any) -> None:
    """Refuse what no plan goes with. Raises UnsupportedError that names the argument, its value and the way out."""
    for refusal in _ALWAYS:
        refusal.check(arguments)


def check_sharded(arguments: Any) -> None:
    """Refuse what a world of several ranks does not go with. Raises UnsupportedError as `check_given` does."""
    for refusal in _SHARDED:
        refusal.check(arguments)
    for refusal in _LOADERS:
        refusal.check(arguments.accelerator_config)


def check_budgeted(arguments: Any) -> None:
    """Refuse what `token_budget`, if it is given, does not go with. Raises ValueError as `check_given` does."""
    budget = arguments.token_budget
    if budget is None:
        return
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise ValueError(f"`token_budget` ({budget!r}) must be a positive number of tokens, or None.")
    for refusal in _BUDGETED:
        refusal.check(arguments, f"`token_budget` ({budget})")
