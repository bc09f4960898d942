"""A training file of VeOmni as a recipe of ours: `hf-veomni convert-config theirs.yaml ours.yaml`.

Every key is converted, or left out because it says how VeOmni goes about it and changes no result, or an error. Three
layouts are read: the flat one (`train.ulysses_parallel_size`), the nested one (`train.accelerator.ulysses_size`), and
the one in which optimizer and accelerator belong to the model (`model.accelerator.ulysses_size`).
VeOmni 0.1, https://github.com/ByteDance-Seed/VeOmni.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_veomni.errors import UnsupportedError
from hf_veomni.plan import ParallelPlan
from hf_veomni.yaml_files import read_mapping

# Where a key goes: "arguments.x" is `x` of OmniTrainingArguments, "plan.x" a size of the plan.
_MOVED = {
    "model.model_path": "model",
    "model.config_path": "model",
    "model.lora_config.rank": "lora.r",
    "model.lora_config.alpha": "lora.lora_alpha",
    "model.lora_config.use_rslora": "lora.use_rslora",
    "model.lora_config.lora_modules": "lora.target_modules",
    "data.train_path": "data.path",
    "data.max_seq_len": "data.max_tokens",
    "data.dataloader.num_workers": "arguments.dataloader_num_workers",
    "data.num_workers": "arguments.dataloader_num_workers",
    "train.output_dir": "arguments.output_dir",
    "train.checkpoint.output_dir": "arguments.output_dir",
    "train.checkpoint.save_steps": "arguments.save_steps",
    "train.save_steps": "arguments.save_steps",
    "train.lr": "arguments.learning_rate",
    "train.optimizer.lr": "arguments.learning_rate",
    "train.weight_decay": "arguments.weight_decay",
    "train.optimizer.weight_decay": "arguments.weight_decay",
    "train.lr_warmup_ratio": "arguments.warmup_steps",
    "train.optimizer.lr_warmup_ratio": "arguments.warmup_steps",
    "train.max_grad_norm": "arguments.max_grad_norm",
    "train.optimizer.max_grad_norm": "arguments.max_grad_norm",
    "train.num_train_epochs": "arguments.num_train_epochs",
    "train.max_steps": "arguments.max_steps",
    "train.micro_batch_size": "arguments.per_device_train_batch_size",
    "train.seed": "arguments.seed",
    "train.enable_full_determinism": "arguments.full_determinism",
    "train.enable_gradient_checkpointing": "arguments.gradient_checkpointing",
    "train.gradient_checkpointing.enable": "arguments.gradient_checkpointing",
    "train.ulysses_parallel_size": "plan.sp",
    "train.accelerator.ulysses_size": "plan.sp",
    "train.expert_parallel_size": "plan.ep",
    "train.accelerator.ep_size": "plan.ep",
    "train.data_parallel_replicate_size": "plan.dp_replicate",
    "train.accelerator.dp_replicate_size": "plan.dp_replicate",
    "train.data_parallel_shard_size": "plan.dp_shard",
    "train.accelerator.dp_shard_size": "plan.dp_shard",
    "train.wandb_name": "arguments.run_name",
    "train.wandb.name": "arguments.run_name",
}

# Sections that the latest layout has moved, and where they are looked up.
_ALIASES = {
    "model.optimizer": "train.optimizer",
    "model.accelerator.gradient_checkpointing": "train.gradient_checkpointing",
    "model.accelerator.init_device": "train.init_device",
    "model.accelerator": "train.accelerator",
    "data.dyn_bsz_buffer_size": "train.dyn_bsz_buffer_size",
}

# Keys, and beginnings of keys, of how VeOmni goes about it. What is done here in their place is in docs/migration.md.
_LEFT_OUT = (
    "model.attn_implementation",
    "model.moe_implementation",
    "model.ops_implementation",
    "model.tokenizer_path",
    "data.chat_template",
    "data.dataloader_type",
    "data.datasets_type",
    "data.drop_last",
    "data.train_size",
    "data.train_sample",
    "data.source_name",
    "train.bsz_warmup_ratio",
    "train.data_parallel_mode",
    "train.accelerator.fsdp_config",
    "train.checkpoint.manager",
    "train.checkpoint.save_hf_weights",
    "train.ckpt_manager",
    "train.init_device",
    "train.gradient_checkpointing.enable_reentrant",
    "train.enable_full_shard",
    "train.rmpad",
    "train.rmpad_with_pos_ids",
    "train.dyn_bsz",
    "train.dyn_bsz_buffer_size",
    "train.dyn_bsz_margin",
    "train.empty_cache_steps",
    "train.save_hf_weights",
    "train.wandb_project",
    "train.wandb.project",
    "train.profile",
)

# Of what is kept for the backward, beside activation checkpointing.
_OFFLOAD = "`activation_checkpointing_kwargs={'offload': True}` offloads the inputs of layers here: leave it out"

# Keys with an equal in one value alone, and the way out from the others.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "data.data_type": (("conversation", "plaintext"), "pack_dataset in a script of your own reads other samples"),
    "data.text_keys": (("messages", "conversations", "text"), "rename the column of the data set to one of these"),
    "model.lora_config.share_expert_lora": ((False,), "each expert has a low-rank pair of its own here: leave it out"),
    "train.accelerator.offload.enable_activation": ((False,), _OFFLOAD),
    "train.enable_activation_offload": ((False,), _OFFLOAD),
    "train.enable_fsdp_offload": ((False,), "parameters stay on the device: use more ranks, or LoRA"),
    "train.accelerator.fsdp_config.offload": ((False,), "parameters stay on the device: use more ranks, or LoRA"),
    "train.checkpoint.save_epochs": ((0, 1), "a recipe saves every `save_steps`, or without them after each epoch"),
    "train.load_checkpoint_path": (("",), "`train(resume_from_checkpoint=...)` in a script goes on from checkpoints"),
    "train.lr_decay_ratio": ((1.0,), "the schedule of a recipe decays until the end"),
    "train.optimizer.lr_decay_ratio": ((1.0,), "the schedule of a recipe decays until the end"),
    "train.accelerator.pp_size": ((1,), "use `sp` and `dp_shard` of the plan"),
    "train.pipeline_parallel_size": ((1,), "use `sp` and `dp_shard` of the plan"),
    "train.accelerator.tp_size": ((1,), "use `sp` and `dp_shard` of the plan"),
    "train.tensor_parallel_size": ((1,), "use `sp` and `dp_shard` of the plan"),
    "train.accelerator.cp_size": ((1,), "use `sp` of the plan"),
    "train.context_parallel_size": ((1,), "use `sp` of the plan"),
    "train.optimizer.type": (("adamw",), "hand another optimizer to OmniTrainer in a script"),
    "train.optimizer": (("adamw",), "hand another optimizer to OmniTrainer in a script"),
}

# Where VeOmni's defaults are not Trainer's.
_DEFAULTS = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant_with_warmup",
    "bf16": True,
    "gradient_checkpointing": True,
    "report_to": "none",
}
_ORDER = ("model", "data", "plan", "lora", "dtype", "processes", "arguments")

_SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup", "linear": "linear"}


def _flatten(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _in_place(key: str) -> str:
    """The name under which a key of any layout is looked up."""
    moved = next((old for old in _ALIASES if _starts(key, (old,))), None)
    return key if moved is None else _ALIASES[moved] + key.removeprefix(moved)


def _starts(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _put(recipe: dict[str, Any], place: str, value: Any, key: str) -> None:
    section, _, name = place.rpartition(".")
    target = recipe.setdefault(section, {}) if section else recipe
    if name in target and target[name] != value:
        raise ValueError(
            f"`{key}` ({value!r}) and another key both stand for `{place}` ({target[name]!r}): keep one of them."
        )
    target[name] = value


def _only(key: str, place: str, value: Any) -> None:
    allowed, way_out = _ONLY[place]
    if value not in allowed:
        raise UnsupportedError(
            f"`{key}` ({value!r}) has no equivalent in a recipe, which knows {' or '.join(map(repr, allowed))}: "
            f"{way_out}."
        )


def _schedule(recipe: dict[str, Any], key: str, value: Any) -> None:
    if value not in _SCHEDULES:
        raise UnsupportedError(f"`{key}` ({value!r}) has no equivalent: use one of {', '.join(_SCHEDULES)}.")
    _put(recipe, "arguments.lr_scheduler_type", _SCHEDULES[value], key)


def _batch(recipe: dict[str, Any], key: str, value: Any) -> None:
    recipe["global_batch_size"] = value


def _wandb(recipe: dict[str, Any], key: str, value: Any) -> None:
    _put(recipe, "arguments.report_to", "wandb" if value else "none", key)


def _mixed(recipe: dict[str, Any], key: str, value: Any) -> None:
    _put(recipe, "arguments.bf16", bool(value), key)


def _expert_parameters(recipe: dict[str, Any], key: str, value: Any) -> None:
    """PEFT compares the ends of names, and knows no `*`: `model.layers.*.mlp.experts.x` is `mlp.experts.x`."""
    _put(recipe, "lora.target_parameters", [name.rpartition("*.")[2] for name in value], key)


def _encoder(recipe: dict[str, Any], key: str, value: Any) -> None:
    recipe["frozen_encoder"] = value


_SPECIAL: dict[str, Callable[[dict[str, Any], str, Any], None]] = {
    "train.lr_decay_style": _schedule,
    "train.optimizer.lr_decay_style": _schedule,
    "train.global_batch_size": _batch,
    "train.freeze_vit": _encoder,
    "model.lora_config.target_parameters": _expert_parameters,
    "train.use_wandb": _wandb,
    "train.wandb.enable": _wandb,
    "train.enable_mixed_precision": _mixed,
    "train.accelerator.fsdp_config.mixed_precision.enable": _mixed,
}


def convert(values: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """The recipe that stands for a VeOmni file.

    Args:
        values: the file's mapping, with the sections `model`, `data` and `train`.
        processes: of the run, by which a global batch becomes micro-batches; VeOmni takes it from the launcher.

    Raises:
        UnsupportedError: a key or a value without an equivalent, with the way out.
        ValueError: a section or a key that must be there is missing, or the batch does not divide.
    """
    recipe: dict[str, Any] = {}
    without: list[str] = []  # messages: a file tends to have several such keys
    for key, value in _flatten(values).items():
        if value is not None:
            try:
                _convert_key(recipe, key, _in_place(key), value)
            except UnsupportedError as error:
                without.append(str(error))
    without += _experts_by_module_name(values)
    if without:
        raise UnsupportedError("\n".join(without))
    for name in ("model", "data.path", "data.max_tokens", "arguments.output_dir"):
        section, _, last = name.rpartition(".")
        if last not in (recipe.get(section, {}) if section else recipe):
            theirs = " or ".join(f"`{key}`" for key, place in _MOVED.items() if place == name)
            raise ValueError(f"{theirs} is missing, and a recipe needs it.")
    _check_encoder(recipe)
    plan = {name: size for name, size in recipe.pop("plan", {}).items() if size not in (1, -1)}
    _accumulate(recipe, plan, processes)
    recipe["plan"] = ",".join(f"{name}={size}" for name, size in plan.items())
    ParallelPlan.parse(recipe["plan"]).resolve(processes)
    recipe["processes"] = processes
    arguments = recipe["arguments"] = {**_DEFAULTS, **recipe["arguments"]}
    if not arguments.get("save_steps"):  # VeOmni saves after each epoch then, Trainer every 500 steps
        arguments.pop("save_steps", None)
        arguments["save_strategy"] = "epoch"
    if "max_steps" in arguments:  # of an epoch there, of the run here
        arguments["max_steps"] *= arguments["num_train_epochs"]
    recipe["dtype"] = "float32" if arguments["bf16"] else "bfloat16"  # VeOmni's, of the weights that are trained
    return {name: recipe[name] for name in _ORDER if name in recipe}


def _convert_key(recipe: dict[str, Any], key: str, place: str, value: Any) -> None:
    """Put one key into the recipe.

    Args:
        key: as it is called in the file.
        place: as it is called in the tables above.
    """
    if place in _SPECIAL:
        _SPECIAL[place](recipe, key, value)
    elif place in _MOVED:
        _put(recipe, _MOVED[place], value, key)
    elif place in _ONLY:
        _only(key, place, value)
    elif not _starts(place, _LEFT_OUT):
        raise UnsupportedError(
            f"`{key}` ({value!r}) has no equivalent in a recipe: remove it from a copy of the file, and see "
            "docs/migration.md for what to use instead."
        )


def _experts_by_module_name(values: Mapping[str, Any]) -> Iterator[str]:
    """Errors for modules of an MLP, by which VeOmni means stacked experts; PEFT finds none, and says nothing."""
    lora = values.get("model", {}).get("lora_config") or {}
    named = [name for name in lora.get("lora_modules") or () if name in ("gate_proj", "up_proj", "down_proj")]
    if named and "share_expert_lora" in lora and not lora.get("target_parameters"):
        yield (
            f"`model.lora_config.lora_modules` ({', '.join(named)}) means the experts' parameters in VeOmni: name "
            "them in `target_parameters: [experts.gate_up_proj, experts.down_proj]` instead."
        )


def _check_encoder(recipe: dict[str, Any]) -> None:
    """LoRA of a recipe leaves encoders out, full fine-tuning trains them."""
    frozen, lora = recipe.pop("frozen_encoder", None), "lora" in recipe
    if frozen is not None and frozen is not lora:
        done = "LoRA leaves the encoder out" if lora else "full fine-tuning trains the encoder, too"
        raise UnsupportedError(
            f"`train.freeze_vit` ({frozen}) has no equivalent in a recipe, where {done}: start from "
            "examples/finetune_vlm.py, or set it to the other value."
        )


def _accumulate(recipe: dict[str, Any], plan: Mapping[str, int], processes: int) -> None:
    """Micro-batches of a step, from the sequences of a step over all data ranks."""
    wanted = recipe.pop("global_batch_size", None)
    if wanted is None:
        return
    arguments = recipe["arguments"]
    once = arguments.get("per_device_train_batch_size", 1) * max(1, processes // plan.get("sp", 1))
    if wanted % once:
        raise ValueError(
            f"`train.global_batch_size` ({wanted}) must be a multiple of the {once} sequences that all data ranks "
            f"read at once ({processes} processes, sp={plan.get('sp', 1)}): give another one, or other --processes."
        )
    arguments["gradient_accumulation_steps"] = wanted // once


def convert_file(source: str | os.PathLike[str], target: str | os.PathLike[str], processes: int) -> None:
    """Read a VeOmni file and write the recipe.

    Raises:
        ValueError: as `convert`, or no such file; `target` exists.
    """
    import yaml

    recipe = convert(read_mapping(source, "VeOmni file", "model: {model_path: Qwen/Qwen3-8B}"), processes)
    if Path(target).exists():
        raise ValueError(f"'{target}' exists: give the name of a new file.")
    Path(target).write_text(f"# From {Path(source).name} of VeOmni.\n" + yaml.safe_dump(recipe, sort_keys=False))
