"""`plan="auto"`: the planner's fastest layout that fits, for the devices, the world and the data at hand."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers.trainer_utils import has_length

from hf_veomni import hf
from hf_veomni.comm.agree import together
from hf_veomni.errors import UnsupportedError
from hf_veomni.fsdp import check_same_value
from hf_veomni.hf.build import load_config
from hf_veomni.logs import announce
from hf_veomni.mesh import is_prepared
from hf_veomni.planner import Device, Entry, Plans, find_device, identify_device, plan_layouts
from hf_veomni.trainer.loaders import sample_sizes
from hf_veomni.trainer.trl import is_trl, trains_rows, trl_name

_ADAMW = "adamw_torch_fused"  # unfused it makes a copy of the trained shard within its step
# Methods of a Trainer that make the optimizer, and packages whose own ones make that of `args.optim`.
_MAKES_OPTIMIZER = ("create_optimizer", "create_optimizer_and_scheduler", "get_optimizer_cls_and_kwargs")
_STOCK = ("transformers", "trl", "hf_veomni")
_BESIDE_LORA = ("modules_to_save", "trainable_token_indices", "use_dora", "bias", "lora_bias", "layer_replication")


def choose_plan(
    args: Any,
    model: object,
    dataset: object,
    peft_config: object = None,
    optimizer: object = None,
    quantization: object = None,
    trainer: object = None,
) -> Entry:
    """The planner's first for a Trainer's arguments, model and training set; the same on all ranks.

    Args:
        args: `OmniTrainingArguments` whose plan is "auto", or "auto:DEVICE" with a name of the table of devices or a
            yaml file. `activation_checkpointing` leaves the layouts that have it.
        model: a transformers model, a `PeftModel`, or what names one.
        peft_config: adapters that are still to be added; their rank is taken to be on all linear layers, the most
            that `target_modules` could have.
        optimizer: one that the Trainer is given, or its class; None is that of `args.optim`.
        quantization: `quantization_config` that a trainer of TRL loads the model with.
        trainer: for whom; one of TRL prepares the rows of `dataset` itself.

    Collectives: an all-gather of what went wrong, and one of the choice.

    Raises:
        ValueError: no training set whose samples have lengths, ranks that see different devices.
        UnsupportedError: a device that is not in the table, a model that the formulas do not describe, quantized
            weights, a trainer of TRL for other things than rows of tokens, another optimizer than fused AdamW,
            parameters that are frozen or trained beside LoRA, nothing that fits, also while the full weights are
            sharded.
    """
    with together("Choosing a plan"):
        _check_trainer(args, trainer)
        _check_quantized(args, model, quantization)
        plans = _plan(args, model, dataset, peft_config, optimizer, trainer)
        if plans.shape.encoders:
            raise UnsupportedError(
                f"`plan` ('{args.plan}') has no formulas for activations of encoders, and {plans.shape.name} has "
                f"{plans.shape.encoders:,} parameters of these: name a plan; a dry run of an `image_batch` checks it."
            )
        best = _best(args, plans)
    check_same_value("plan", str(best.layout))
    announce(
        f"`plan` ('{args.plan}') takes {best.layout}: by formulas {best.memory.total / 2**30:.1f} GiB of tensors and "
        f"{best.tokens_per_second / plans.world_size:.0f} tokens/s on each of {plans.world_size} x "
        f"{plans.device.name}. {_batch(args, best.layout.data)}"
    )
    return best


def _batch(args: Any, ranks: int) -> str:
    """What a step takes, which depends on the data ranks that the plan leaves."""
    steps = ranks * args.gradient_accumulation_steps
    if args.token_budget:
        size = f"up to {steps * args.token_budget:,} tokens"
    else:
        size = f"{steps * args.per_device_train_batch_size:,} samples"
    return f"It has {ranks} data rank{'s' if ranks > 1 else ''}: a step takes {size}."


def _best(args: Any, plans: Plans) -> Entry:
    """The fastest that fits, in training and while it is made of the full model that the Trainer is given."""
    fitting = [e for e in plans.fitting if e.layout.checkpointing or not args.activation_checkpointing]
    best = fitting[0] if fitting else plans.best
    found = next((entry for entry in fitting or [best] if plans.loads(entry)), None)
    if found is None:
        raise UnsupportedError(
            f"`plan` ('{args.plan}') puts the full model on each device before it shards it, and {plans.shape.name} "
            f"takes {best.loading / 2**30:.1f} GiB then, more than the {plans.device.memory_gib} GiB of a device: "
            "pass a model that is built on the meta device and sharded with `prepare_omni(model, plan, "
            f"checkpoint=...)`, and the same plan, such as '{best.layout.plan}' (docs/accelerate.md)."
        )
    return found


def _plan(args: Any, model: Any, dataset: object, peft_config: object, optimizer: object, trainer: object) -> Plans:
    if isinstance(model, nn.Module) and is_prepared(model):
        raise ValueError(f"`plan` ('{args.plan}') is chosen before the model is prepared: pass the plain model.")
    if model is None:
        raise UnsupportedError(f"`plan` ('{args.plan}') needs `model`, not `model_init`: name a plan.")
    module = isinstance(model, nn.Module)
    config: Any = hf.base_model(model).config if module else load_config(model)
    dtype = next(model.parameters()).dtype if module else _loaded_dtype(args, config)
    adapters: Any = next(iter(model.peft_config.values())) if isinstance(model, PeftModel) else peft_config
    if dtype != torch.bfloat16 and not args.bf16:
        raise UnsupportedError(
            f"`plan` ('{args.plan}') has formulas for a computation in bf16, not in {dtype}: set `bf16=True`, load "
            "the model in bfloat16, or name a plan."
        )
    _check_trained(args, model, adapters, optimizer)
    context, document = _lengths(args, dataset, trainer)
    return plan_layouts(
        config,
        args.world_size,
        _device(args),
        context=context,
        document=document,
        accumulation=args.gradient_accumulation_steps,
        lora=None if adapters is None else max([adapters.r, *(adapters.rank_pattern or {}).values()]),
        mixed_precision=bool(args.bf16),
        fp32=dtype != torch.bfloat16,
        without=("pp", "pairs"),  # which not every training takes: name them
    )


def _check_trainer(args: Any, trainer: object) -> None:
    """Raise UnsupportedError for a trainer whose loss, or whose optimizer, is another than the formulas have."""
    if is_trl(trainer) and not trains_rows(trainer):
        raise UnsupportedError(
            f"`plan` ('{args.plan}') has formulas for the loss of the tokens of a row, and {trl_name(trainer)} has "
            "another one, or reference models beside it: name a plan."
        )
    for name in _MAKES_OPTIMIZER:
        owner = next((kind for kind in type(trainer).__mro__ if name in vars(kind)), None)
        if owner is not None and owner.__module__.partition(".")[0] not in _STOCK:
            raise UnsupportedError(
                f"`plan` ('{args.plan}') has formulas for '{_ADAMW}' by `optim`, and {owner.__name__} has a `{name}` "
                "of its own: name a plan, or leave the optimizer to `optim`."
            )


def _check_quantized(args: Any, model: Any, quantization: object) -> None:
    """Raise UnsupportedError for weights that are quantized, or will be when they are loaded."""
    if isinstance(model, nn.Module):
        odd = next((p for p in model.parameters() if not _is_plain(p)), None)
        kind = None if odd is None else type(odd).__name__ if odd.is_floating_point() else str(odd.dtype)
        found = getattr(getattr(model, "config", None), "quantization_config", None) or kind
    else:
        given = (getattr(args, "model_init_kwargs", None) or {}).get("quantization_config")
        config = None if model is None else load_config(model)
        found = quantization or given or getattr(config, "quantization_config", None)
    if found is not None:
        raise UnsupportedError(
            f"`plan` ('{args.plan}') has formulas for weights in bf16 or fp32, and the model's are quantized "
            f"({found if isinstance(found, str) else type(found).__name__}): name a plan, or load it without "
            "`quantization_config`."
        )


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether its numbers are what it holds; quantized ones are integers, or a class of their own (torchao, bnb)."""
    return type(parameter) is nn.Parameter and parameter.is_floating_point()


def _loaded_dtype(args: Any, config: Any) -> torch.dtype:
    """In which the trainer behind will load the model that it is given by name, as those of TRL do: fp32, unless their
    arguments say otherwise. A Trainer of transformers has loaded its own by now."""
    given = (getattr(args, "model_init_kwargs", None) or {}).get("dtype", "float32")
    if given in (None, "auto"):
        given = getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype):
        raise ValueError(f"`dtype` ('{given}') of `model_init_kwargs` is no dtype of torch: use bfloat16 or float32.")
    return found


def _check_trained(args: Any, model: Any, adapters: Any, optimizer: object) -> None:
    """Raise UnsupportedError where other things are trained, or otherwise, than the formulas have."""
    found = None
    if optimizer is not None:
        found = f"an optimizer of its own (`optimizers`), and its formulas are for '{_ADAMW}' by `optim`"
    elif str(getattr(args.optim, "value", args.optim)) != _ADAMW:
        found = f"`optim` ('{getattr(args.optim, 'value', args.optim)}'), and its formulas are for '{_ADAMW}'"
    elif adapters is None and isinstance(model, nn.Module) and not all(p.requires_grad for p in model.parameters()):
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        found = f"{frozen:,} frozen parameters, and its formulas train all or LoRA"
    elif isinstance(model, PeftModel) and len(model.peft_config) > 1:
        found = f"{len(model.peft_config)} adapters ({', '.join(model.peft_config)}), and its formulas have one"
    elif adapters is not None and not isinstance(adapters, LoraConfig):
        found = f"adapters of a {type(adapters).__name__}, and its formulas have LoRA"
    elif adapters is not None:
        found = _beside_lora(adapters)
    if found is not None:
        raise UnsupportedError(f"`plan` ('{args.plan}') is given {found}: name a plan; `hf-veomni dry-run` checks it.")


def _beside_lora(adapters: LoraConfig) -> str | None:
    """What of a config of LoRA adds parameters or operations that plain LoRA has not."""
    given = {name: getattr(adapters, name, None) for name in _BESIDE_LORA}
    found = next(((name, value) for name, value in given.items() if value and value != "none"), None)
    return found and f"LoRA with `{found[0]}` ({found[1]!r}), and its formulas have plain LoRA"


def _device(args: Any) -> Device:
    named = args.plan.partition(":")[2].strip()
    if named:
        return find_device(named)
    if args.device.type != "cuda":
        raise UnsupportedError(
            f"`plan` ('{args.plan}') knows no device '{args.device.type}': name a plan, or the device that it is to "
            "be like, as in 'auto:h100-80gb' or 'auto:mine.yaml'."
        )
    properties = torch.cuda.get_device_properties(args.device)
    return identify_device(properties.name, properties.total_memory / 2**30)


def _lengths(args: Any, dataset: Any, trainer: object) -> tuple[int, int]:
    """Tokens of the largest micro-batch of a data rank, and of the longest document in it."""
    if dataset is None or not has_length(dataset) or not len(dataset):
        raise ValueError(
            f"`plan` ('{args.plan}') is chosen by the lengths of the samples in `train_dataset`, and there is none "
            "that tells them before training: name a plan."
        )
    try:
        lengths, documents = sample_sizes(dataset, args.length_column_name)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"`plan` ('{args.plan}') is chosen by the lengths of the samples in `train_dataset`. {error} Or name a "
            "plan."
        ) from error
    row = int(lengths.max())
    longest = max(int(max(parts)) if getattr(parts, "ndim", 0) else int(parts) for parts in documents)
    if is_trl(trainer) and not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        row, longest = _shorten(args, row, int(lengths.sum()))
    tokens = args.token_budget or row * args.per_device_train_batch_size
    return tokens, min(longest, tokens)


def _shorten(args: Any, longest: int, total: int) -> tuple[int, int]:
    """Tokens of a row and of its longest document, as TRL makes them of samples: it cuts them to `max_length`, and
    with `packing` fills rows up to that. Its strategy "wrapped" does not tell documents apart."""
    limit = args.max_length or total
    document = min(longest, limit)
    if not args.packing:
        return document, document
    row = min(total, limit)
    return row, row if args.packing_strategy == "wrapped" else document
