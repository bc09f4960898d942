"""Compare a prepared model on several ranks with the untouched stock model on one.

The reference never packs, pads or shards: the stock model runs every document alone. Data rank d has rows of its own,
and the reference gradient is the mean over data ranks of the gradients of their losses, which is what FSDP's average
over dp_replicate x fsdp must give.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.models import build_model, count_targets, document_lengths, packed_batch, padded_batch

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What both sides compute; `Run` says how the ranks do it."""

    model: str
    dp_size: int = 1
    packed: bool = True
    micro_batches: int = 1
    attention: str | None = None
    dtype: torch.dtype = torch.float32
    lora: bool = False
    lengths: tuple[tuple[int, ...], ...] | None = None  # of the documents of each batch; None takes uneven ones
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """How the ranks compute it."""

    plan: str | dict[str, Any]
    attention: str = "auto"
    chunked_loss: bool = True
    checkpointing: bool = False
    synchronize_each: bool = True
    compiled: str | None = None  # torch.compile's backend for the layers


@dataclass
class Errors:
    """Largest relative differences of one rank; `parameter` is the one with the worst gradient."""

    loss: float = 0.0
    logits: float = 0.0
    gradient: float = 0.0
    parameter: str = ""
    norm: float = 0.0
    one_sided: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


# Odd sizes, uneven over data ranks and micro-batches, with documents of one token.
_LENGTHS = ((11, 1, 17, 8), (5, 23, 13), (1, 1, 29), (19, 24), (7, 2, 2, 26), (31,), (3, 14, 16), (22, 9, 4))
_ROWS = ((23, 37), (41, 5), (17, 29), (13, 43), (35, 35), (1, 33), (27, 39), (31, 8))


def make_batches(setting: Setting) -> list[list[Batch]]:
    """Batches by data rank and micro-batch."""
    make, lengths = (packed_batch, _LENGTHS) if setting.packed else (padded_batch, _ROWS)
    lengths, count = setting.lengths or lengths, setting.micro_batches
    return [
        [make(lengths[rank * count + micro], seed=rank * count + micro) for micro in range(count)]
        for rank in range(setting.dp_size)
    ]


def num_items(batches: list[Batch]) -> int | None:
    """Targets of one data rank's accumulation window; None leaves the mean over its one batch to the model."""
    return sum(count_targets(batch) for batch in batches) if len(batches) > 1 else None


def make_model(setting: Setting) -> nn.Module:
    """The stock model, with an adapter if wanted; the same on every rank."""
    model = build_model(setting.model, attention=setting.attention, dtype=setting.dtype, **setting.overrides)
    return add_adapter(model) if setting.lora else model


def add_adapter(model: nn.Module) -> nn.Module:
    """A LoRA adapter on every linear layer and stacked expert, both of its factors random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    # PEFT's "all-linear" finds the experts of families whose files have them one by one; not those of GPT-OSS.
    experts = ["experts.gate_up_proj", "experts.down_proj"] if model.config.model_type == "gpt_oss" else None
    config = LoraConfig(r=4, target_modules="all-linear", target_parameters=experts, init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 0, 0.08)
    return wrapped


def documents(batch: Batch) -> Iterator[tuple[int, int, Batch]]:
    """Every document alone, with its row and where it begins."""
    if "position_ids" in batch:
        begin = 0
        for length in document_lengths(batch):
            part = slice(begin, begin + length)
            yield 0, begin, {key: batch[key][:, part] for key in ("input_ids", "labels")}
            begin += length
    else:
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            yield row, 0, {key: batch[key][row : row + 1, :length] for key in ("input_ids", "labels")}


def compute_reference(setting: Setting, path: Path) -> None:
    """Loss, logits and gradients of the stock model, document by document, written to `path`."""
    model = make_model(setting)
    losses, logits = [], []
    for batches in make_batches(setting):
        total = num_items(batches)
        for batch in batches:
            items = total or count_targets(batch)
            found, row_logits = 0.0, {}
            for row, begin, document in documents(batch):
                out = model(**document, num_items_in_batch=items, use_cache=False)
                loss = out.loss if setting.dtype != torch.float64 else _exact_loss(out.logits, document, items)
                (loss / setting.dp_size).backward()
                found += loss.item()
                row_logits[row, begin] = out.logits.detach()
            losses.append(found)
            logits.append(row_logits)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.save({"losses": losses, "logits": logits, "gradients": gradients, "norm": norm}, path)


def _exact_loss(logits: Tensor, document: Batch, items: int) -> Tensor:
    """The stock loss without its cast of the logits to fp32."""
    targets = F.pad(document["labels"], (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / items


def compare(setting: Setting, run: Run, path: str) -> dict[str, Any]:
    """On every rank: the prepared model against the reference at `path`; returns `Errors` as a dictionary."""
    from hf_veomni import compile_layers, prepare_omni

    model = make_model(setting)
    prepare_omni(model, run.plan, attention=run.attention, chunked_loss=run.chunked_loss)
    if run.checkpointing:
        model.gradient_checkpointing_enable()
    if run.compiled:
        compile_layers(model, backend=run.compiled)
    return measure(model, setting, run, path)


def measure(model: nn.Module, setting: Setting, run: Run, path: str) -> dict[str, Any]:
    """One accumulation window of a prepared model against the reference at `path`."""
    from hf_veomni import get_parallel_state

    reference = torch.load(path)
    state = get_parallel_state(model)
    batches = make_batches(setting)[state.dp_rank]
    first = state.dp_rank * setting.micro_batches
    errors = Errors()
    for micro, batch in enumerate(batches):
        errors.logits = max(errors.logits, _compare_logits(model, batch, reference["logits"][first + micro]))
    train = _train_in_pairs if state.plan.overlap == "pairs" else _train
    errors.losses = train(model, run, batches)
    for loss, expected in zip(errors.losses, reference["losses"][first:], strict=False):
        errors.loss = max(errors.loss, abs(loss - expected) / abs(expected))
    compare_gradients(model, reference, errors)
    return asdict(errors)


def _loss(model: nn.Module, total: int | None, batch: Batch) -> Tensor:
    return model(**batch, **({} if total is None else {"num_items_in_batch": torch.tensor(total)})).loss


def _train(model: Any, run: Run, batches: list[Batch]) -> list[float]:
    losses = []
    for micro, batch in enumerate(batches):
        if not run.synchronize_each:
            model.set_requires_gradient_sync(micro + 1 == len(batches))
        loss = _loss(model, num_items(batches), batch)
        loss.backward()
        losses.append(loss.item())
    return losses


def _train_in_pairs(model: Any, run: Run, batches: list[Batch]) -> list[float]:
    from hf_veomni import run_pair

    function = partial(_loss, model, num_items(batches))
    losses: list[Tensor] = []
    for micro, (first, second) in enumerate(zip(batches[::2], batches[1::2], strict=True)):
        if not run.synchronize_each:
            model.set_requires_gradient_sync(2 * micro + 2 == len(batches))
        found = run_pair(function, first, second)
        sum(found).backward()  # pyright: ignore
        losses += found
    return [loss.item() for loss in losses]


def _compare_logits(model: nn.Module, batch: Batch, expected: dict[tuple[int, int], Tensor]) -> float:
    from hf_veomni import gather_sequence

    model.eval()
    with torch.no_grad():
        logits = gather_sequence(model(**batch).logits, model)
    model.train()
    assert logits.shape[:2] == batch["input_ids"].shape, logits.shape
    parts = [(logits[row : row + 1, begin : begin + x.shape[1]], x) for (row, begin), x in expected.items()]
    return max(relative_error(got, wanted) for got, wanted in parts)


def compare_gradients(model: nn.Module, reference: dict[str, Any], errors: Errors) -> None:
    """Enter the worst relative error of the gradients and of their norm into `errors`. Collective."""
    from hf_veomni import clip_grad_norm_
    from hf_veomni.expert import find_layouts

    layouts = find_layouts(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    errors.one_sided = sorted(trained.keys() ^ reference["gradients"].keys())
    for name, parameter in trained.items():
        wanted = reference["gradients"].get(name)
        # Zeros stand for no gradient: towers get them on ranks whose rows have nothing for them.
        zeros = wanted is None and parameter.grad is not None and not whole(parameter.grad).any()
        if (parameter.grad is None) != (wanted is None) and not zeros:
            errors.one_sided.append(name)
        elif wanted is not None:
            assert parameter.grad.dtype == wanted.dtype, (name, parameter.grad.dtype)
            got = whole(parameter.grad)
            error = relative_error(layouts[name].to_plain(got) if name in layouts else got, wanted)
            if error >= errors.gradient:
                errors.gradient, errors.parameter = error, name
    norm = clip_grad_norm_(model.parameters(), 1e9)
    errors.norm = relative_error(norm, reference["norm"])


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor (a collective), anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """max|got - wanted| / max|wanted|; infinite for anything but zeros where zeros are wanted, and for nan."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    difference = (got.double() - wanted.double()).abs().max().item()
    scale = wanted.double().abs().max().item()
    if difference == 0:
        return 0.0
    return difference / scale if scale and difference == difference else float("inf")
