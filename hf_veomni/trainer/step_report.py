"""The step report of a Trainer: how each step was spent on every rank, in the log, as json and as a page.

Every log asks all ranks for their sums since the last one, and adds a row to `step_report.json` in the output
directory, which `hf-veomni doctor` reads. At the end, or where training fails, the page `step_report.html` is written
beside it. A rank other than the first writes its failure to a file of its own: others may not be there any more.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_veomni import hf
from hf_veomni.comm import all_gather
from hf_veomni.doctor import FAILED, OUT_OF_MEMORY, RECORD, Row
from hf_veomni.flops import device_peak, token_places
from hf_veomni.hf.require import override, require_overrides
from hf_veomni.mesh import ParallelState, get_parallel_state
from hf_veomni.sequence.backbone import find_layers
from hf_veomni.step_page import write_page
from hf_veomni.trainer.loaders import DummyBatch
from hf_veomni.trainer.step_clock import PHASES, StepClock
from hf_veomni.trainer.throughput import BatchCount

if TYPE_CHECKING:
    from hf_veomni.trainer.loop import BatchingMixin as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)

_FACTS: tuple[str, ...] = (*PHASES, "exchange", "work", "tokens", "flops", "memory", "compiled")
_EXPERTS = re.compile(r"^expert_load")


class StepReportCallback(TrainerCallback):
    """Measures steps and writes the report; OmniTrainer adds it for `step_report`.

    Attributes:
        rows: of each log, on all ranks.
    """

    def __init__(self, model: nn.Module, state: ParallelState, args: Any) -> None:
        """
        Args:
            model: as it is trained.
            state: its parallel state.
            args: of the Trainer.
        """
        self.state, self.args, self.clock = state, args, StepClock(state.device)
        self.rows: list[Row] = []
        self._peak = device_peak(state.device)
        base: Any = hf.base_model(model)
        self._about = _describe(base, model, state, args)
        layers = find_layers(hf.find_backbone(base))
        self._handles = self.clock.watch(list(layers[1]) if layers is not None else [])
        self._count = BatchCount(model, "the step report")
        self._context = 0
        self._document: Tensor | int = 0
        self._steps = self._seen = 0

    def note_lengths(self, batch: Mapping[str, Any]) -> None:
        """Note how long a batch is that is about to run. No wait for the device."""
        lengths = token_places(batch)[1]
        self._context = max(self._context, lengths.numel())
        self._document = torch.as_tensor(self._document, device=lengths.device).maximum(lengths.max())

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count one batch of this data rank."""
        self._count.add(batch)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.mark("other")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        self.clock.mark("other")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collective: `take`, where steps came after the last log."""
        if self._steps:
            self.take(state.global_step, {})
        for handle in self._handles:
            handle.remove()
        self._write()

    def take(self, step: int, logs: Mapping[str, float]) -> dict[str, float]:
        """The figures since the last log, for the log.

        Collective: one all-gather of a few numbers over all ranks.
        """
        sums = self.clock.take()
        memory = torch.cuda.max_memory_allocated(self.state.device) if self.state.device.type == "cuda" else 0
        compiled = _compilations()
        facts = {**sums, "tokens": self._count.tokens, "flops": self._count.total, "memory": memory}
        facts["compiled"] = compiled - self._seen
        sent = [torch.as_tensor(facts[name], dtype=torch.float64).to(self.state.device) for name in _FACTS]
        mine = torch.stack(sent)
        found = (all_gather(mine) if self.state.world_size > 1 else mine).view(-1, len(_FACTS)).tolist()
        ranks: list[dict[str, float]] = [dict(zip(_FACTS, row, strict=True)) for row in found]
        steps, self._steps, self._seen = max(self._steps, 1), 0, compiled
        self._count.restart()
        experts = {name: value for name, value in logs.items() if _EXPERTS.match(name)}
        row = Row.of(step, steps, ranks, self.state.sp_size, self._peak, experts)
        self.rows.append(row)
        self._write(page=False)
        return row.log()

    @contextmanager
    def noting_failures(self) -> Iterator[None]:
        """Around training: an error goes into the report before it goes on."""
        folder, mine = Path(self.args.output_dir), FAILED.format(_rank())
        for path in folder.glob(
            FAILED.format("*")
        ):  # of a run before; this rank's, and those of ranks that are no more
            if path.name == mine or path.name not in map(FAILED.format, range(self.state.world_size)):
                path.unlink(missing_ok=True)
        try:
            yield
        except Exception as error:
            memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
            kind = OUT_OF_MEMORY if memory else type(error).__name__
            try:
                self._write({"kind": kind, "message": str(error), "rank": _rank(), "time": time.time()})
            except Exception:  # which is not to take the place of what went wrong
                logger.exception("The step report of rank %d could not be written.", _rank())
            raise

    def _write(self, error: dict[str, Any] | None = None, page: bool = True) -> None:
        if _rank() and not error:
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        about = {**self._about, "context": self._context, "document": int(self._document), "error": error}
        record = {**about, "rows": [row.to_dict() for row in self.rows]}
        name = FAILED.format(_rank()) if _rank() else RECORD
        (folder / name).write_text(json.dumps(record, indent=1) + "\n")
        if page and not _rank():
            write_page(folder)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class StepReportMixin(_Trainer):
    """Overrides of Trainer that tell the report where a step is."""

    _step_report: StepReportCallback | None = None

    def _watch_steps(self, model: nn.Module) -> None:
        if self._step_report is not None:  # of the model before, from `model_init`
            self.remove_callback(self._step_report)
        report = self._step_report = StepReportCallback(model, get_parallel_state(model), self.args)
        self.add_callback(report)
        vars(self.accelerator).pop("backward", None)
        backward = self.accelerator.backward

        @wraps(backward)
        def marked(*args: object, **kwargs: object) -> Any:
            report.clock.mark("backward")
            return backward(*args, **kwargs)

        self.accelerator.backward = marked

    @override
    def train(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self._step_report is None else self._step_report.noting_failures():
            return super().train(*args, **kwargs)

    @override
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self._step_report is None:
            return super().get_batch_samples(*args, **kwargs)
        self._step_report.clock.mark("data")
        found = super().get_batch_samples(*args, **kwargs)
        self._step_report.clock.mark("other")
        return found

    @override
    def training_step(self, model: nn.Module, inputs: Any, *args: object, **kwargs: object) -> Tensor:
        report = self._step_report
        if report is None:
            return super().training_step(model, inputs, *args, **kwargs)
        counts = not isinstance(inputs, DummyBatch)
        if counts:
            report.note_lengths(inputs)
        report.clock.mark("forward")
        with report.clock.watching_exchanges():
            loss = super().training_step(model, inputs, *args, **kwargs)
        report.clock.mark("optimizer")
        if counts:
            report.add(inputs)
        return loss

    @override
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Collective if steps are reported: every rank calls it, as Trainer does."""
        if self._step_report is not None and "loss" in logs:
            logs = {**logs, **self._step_report.take(self.state.global_step, logs)}
        super().log(logs, *args, **kwargs)


require_overrides(StepReportMixin, Trainer)


def _describe(base: Any, model: nn.Module, state: ParallelState, args: Any) -> dict[str, Any]:
    """What was run: by it the doctor plans again."""
    parameters = list(model.parameters())
    adapters = getattr(model, "peft_config", None)
    device = {"name": state.device.type, "memory_gib": 0.0}
    if state.device.type == "cuda":
        properties = torch.cuda.get_device_properties(state.device)
        device = {"name": properties.name, "memory_gib": properties.total_memory / 2**30}
    config = base.config.to_dict()
    return {
        "model": type(base).__name__.removeprefix("FSDP"),
        "config": json.loads(json.dumps(config, default=str)),
        "plan": str(state.plan),
        "world_size": state.world_size,
        "sp_size": state.sp_size,
        "ep_size": state.ep_size,
        "device": device,
        "checkpointing": bool(args.activation_checkpointing),
        "accumulation": args.gradient_accumulation_steps,
        "lora": None if adapters is None else int(getattr(next(iter(adapters.values())), "r", 16)),
        "mixed": bool(args.bf16),
        "fp32": all(p.dtype == torch.float32 for p in parameters),
    }


def _compilations() -> int:
    """Graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["frames"]["ok"])
