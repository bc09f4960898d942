"""`dry_run`: the real code on ranks that are not there, without a GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedConfig

from hf_veomni import hf
from hf_veomni.dryrun.encoders import encoding, has_encoder_inputs, keeps_values
from hf_veomni.dryrun.report import DryRun
from hf_veomni.dryrun.step import Recorded, record_step
from hf_veomni.dryrun.world import fake_world
from hf_veomni.errors import UnsupportedError
from hf_veomni.hf.build import builder, load_config
from hf_veomni.host import as_values, forget, move, remember
from hf_veomni.mesh import get_parallel_state
from hf_veomni.plan import ParallelPlan
from hf_veomni.prepare import detach_omni, prepare_omni

Model = str | os.PathLike[str] | PreTrainedConfig | Callable[[], nn.Module]
KERNELS = ("cuda", "cpu")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def dry_run(
    model: Model,
    plan: ParallelPlan | str | None,
    world_size: int,
    *,
    tokens: int | Sequence[int] = 4096,
    batch: Mapping[str, Tensor] | None = None,
    rank: int = 0,
    kernels: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    mixed_precision: bool = False,
    checkpointing: bool = False,
    lora: int | Any = None,
    accumulation: int = 1,
    skew: float = 1.0,
) -> DryRun:
    """Run one training step of one of `world_size` ranks in this process, with tensors that have no memory.

    It is the real code: `prepare_omni`, its hooks and exchanges, FSDP2, loss, backward, clipping and AdamW. What it
    assumes of values and of the other ranks: docs/planning.md.

    Args:
        model: Hub id, folder or path of a config.json; a config; or a function that builds the model, called where
            its parameters are fake (a `PeftModel`, or one that no Auto class makes).
        plan: as in `prepare_omni`.
        tokens: of the packed sequence, or the lengths of its documents.
        batch: real tensors on the CPU that the model is called with, in place of text of `tokens`; with `labels` and
            `position_ids`. Values of images, videos and audio do not count, their ids and grids do.
        rank: which one to play.
        kernels: "cuda" chooses as on a CUDA device (varlen attention, grouped matmuls), "cpu" as on the CPU.
        dtype: of the parameters.
        mixed_precision: bf16 autocast and bf16 gathers around parameters in `dtype`, as the Trainer with `bf16=True`.
        checkpointing: activation checkpointing of the layers.
        lora: rank of LoRA adapters on all linear layers, or a PEFT config; None trains all parameters.
        accumulation: micro-batches of the step.
        skew: what this rank's experts get, over their share.

    Raises:
        ValueError: an unknown device, or a plan, rank or batch that does not fit.
        UnsupportedError: an encoder that asks for values, a quantized config, what `prepare_omni` refuses.
        RuntimeError: `torch.distributed` is initialised.
    """
    began = time.perf_counter()
    _check(kernels, rank, world_size, accumulation, dtype, lora)
    _check_skew(skew, resolved := _resolve(plan, world_size))
    given = text_batch(tokens) if batch is None else batch
    build = model if callable(model) else _builder(load_config(model), dtype)
    with fake_world(world_size, rank, kernels=kernels, skew=skew):
        built = add_adapters(build(), lora)
        found = _record(built, resolved, given, accumulation, mixed_precision, checkpointing)
    return DryRun(
        model=type(hf.base_model(built)).__name__.removeprefix("FSDP"),
        plan=str(resolved),
        world_size=world_size,
        rank=rank,
        tokens=int(given["input_ids"].shape[-1]),
        kernels=kernels,
        seconds=time.perf_counter() - began,
        **vars(found),
    )


def _record(
    model: nn.Module,
    plan: ParallelPlan,
    batch: Mapping[str, Any],
    accumulation: int,
    mixed_precision: bool,
    checkpointing: bool,
) -> Recorded:
    """A step of the model, prepared within a world that is not there."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed_precision else None
    prepared = prepare_omni(model, plan, mp_policy=policy)
    if checkpointing:
        hf.base_model(prepared).activation_checkpointing_enable()
    prepared.train()
    device, encodes = get_parallel_state(prepared).device, has_encoder_inputs(batch)
    batches = [
        {key: _fake(value, device, encodes and keeps_values(key)) for key, value in batch.items()}
        for _ in range(accumulation)
    ]
    try:
        with encoding(prepared) if encodes else nullcontext():
            return record_step(prepared, batches, fake=True, autocast=mixed_precision)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UnsupportedError(
            f"{type(hf.base_model(prepared)).__name__} asks for values in its forward ({error.func}), which a dry run "
            "does not have: run this model on real ranks; decoder-only models of its family can be dry-run."
        ) from error
    finally:
        detach_omni(prepared)  # what is process-wide is put back


def _resolve(plan: ParallelPlan | str | None, world_size: int) -> ParallelPlan:
    resolved = ParallelPlan.parse(plan).resolve(world_size)
    if resolved.pp_size > 1:
        raise UnsupportedError(
            f"`pp_size` ({resolved.pp_size}) is not available in a dry run, where nobody sends what a stage receives: "
            "run the plan without it, with as many layers as a stage has (`num_hidden_layers`)."
        )
    return resolved


def _builder(config: PreTrainedConfig, dtype: torch.dtype) -> Callable[[], nn.Module]:
    if getattr(config, "quantization_config", None):
        raise UnsupportedError(
            "The config has a `quantization_config`, and a dry run has weights in `dtype`: delete it from the config "
            "to run these, or pass a function that builds the quantized model."
        )
    return builder(config, dtype)


def _check_skew(skew: float, plan: ParallelPlan) -> None:
    if not 0 < skew < float("inf"):
        raise ValueError(f"`skew` ({skew}) must be above 0; 1 is balanced.")
    if skew != 1 and plan.ep_size == 1:
        raise ValueError(
            f"`skew` ({skew}) is what one rank's experts get over their share, and under the plan '{plan}' every rank "
            "has all experts: set `ep` in the plan, or leave `skew` out."
        )


def _check(kernels: str, rank: int, world_size: int, accumulation: int, dtype: torch.dtype, lora: Any) -> None:
    if kernels not in KERNELS:
        raise ValueError(f"`kernels` ({kernels!r}) must be one of {', '.join(KERNELS)}.")
    if world_size < 1:
        raise ValueError(f"`world_size` ({world_size}) must be 1 or more ranks.")
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` ({rank}) must be one of the {world_size} ranks: 0 to {world_size - 1}.")
    if accumulation < 1:
        raise ValueError(f"`accumulation` ({accumulation}) must be 1 or more micro-batches.")
    if dtype not in _DTYPES:
        raise ValueError(f"`dtype` ({dtype}) must be what parameters are trained in: {', '.join(map(str, _DTYPES))}.")
    if isinstance(lora, int) and lora < 1:
        raise ValueError(f"`lora` ({lora}) must be a rank of 1 or more, or None to train all parameters.")


def _fake(value: object, device: torch.device, keep: bool) -> Any:
    """A tensor of the batch as the model gets it; `keep`: its values stay through the model's own code."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return move(forget(value), device)
    return as_values(forget(value)) if keep else remember(forget(value), device)


def text_batch(tokens: int | Sequence[int]) -> dict[str, Tensor]:
    """One packed sequence of documents of these lengths, as a collator makes it.

    Raises:
        ValueError: a document of less than two tokens, which has nothing to learn.
    """
    lengths = [tokens] if isinstance(tokens, int) else list(tokens)
    if not lengths or min(lengths) < 2:
        raise ValueError(f"`tokens` ({tokens}) must be one length, or several, of 2 tokens or more.")
    ids = torch.ones(1, sum(lengths), dtype=torch.long)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def add_adapters(model: nn.Module, lora: object) -> nn.Module:
    """`model` with LoRA of this rank on its linear layers, or with a PEFT config's adapters; None: as it is."""
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora, target_modules="all-linear") if isinstance(lora, int) else lora
    return get_peft_model(model, config)  # type: ignore[arg-type, return-value]
