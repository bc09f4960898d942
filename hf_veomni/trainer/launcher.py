"""What `accelerate launch` exported, checked against the plan and then taken out of the way.

The one stock yaml that carries a plan needs `distributed_type: FSDP`, and its launcher therefore exports switches that
make accelerate build a ParallelismConfig of its own (which rejects our string) and, on a GPU, wrap the model a second
time. The plan owns both jobs, so the same yaml works on CPU and GPU.
"""

from __future__ import annotations

import os

from hf_veomni.errors import UnsupportedError
from hf_veomni.plan import ACCELERATE_ENV_VARIABLE, ACCELERATE_PREFIX, ParallelPlan

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
            raise UnsupportedError(f"{variable}=true, exported by the launcher, does not go with a plan: {reason}.")
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
