"""A rank of a run that is killed: resumes from the newest complete checkpoint, trains to the end, leaves its state."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from tests.ranks.training import PackedRows, adapt_experts, collate, full, lora_model, tiny_mixtral, tiny_model

WORLD = 2
RESULT = "result.pt"
TIMEOUT = timedelta(seconds=30)  # of a collective, and of a start whose other rank was killed before it came
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Variant:
    """What is trained and how it is saved.

    Attributes:
        experts: a mixture of experts under sp=2, ep=2; else a dense model under dp_shard=2.
        lora: adapters alone are trained.
        saving: "plain", "sharded" or "async".
    """

    experts: bool = False
    lora: bool = False
    saving: str = "plain"
    steps: int = 24

    @property
    def name(self) -> str:
        return f"{'experts' if self.experts else 'dense'}-{'lora' if self.lora else 'full'}-{self.saving}"

    @property
    def plan(self) -> str:
        return "sp=2,ep=2" if self.experts else "dp_shard=2"

    def model(self) -> nn.Module:
        if self.experts:
            return adapt_experts(tiny_mixtral()) if self.lora else tiny_mixtral()
        return lora_model() if self.lora else tiny_model(attention_dropout=0.1)

    def arguments(self) -> dict[str, Any]:
        return {"sharded_weights": self.saving != "plain", "async_save": self.saving == "async"}


class _Report(TrainerCallback):
    """Tells the driver at which step this attempt began."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if dist.get_rank() == 0:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(state.global_step))
            os.replace(part, self.path)


def run_rank(rank: int, variant: Variant, folder: Path, rendezvous: Path, report: Path) -> None:
    """What a process of the run does, from its start to its end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = os.open(folder / f"output{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR2)  # where a rank stands that does not end
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    method = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=WORLD, timeout=TIMEOUT)
    torch.manual_seed(0)
    trainer = _trainer(variant, folder, report)
    try:
        trainer.train(resume_from_checkpoint=True)
    except ValueError as error:
        if "No complete checkpoint" not in str(error):
            raise
        trainer.train()
    _leave_result(trainer, folder)
    os._exit(0)  # without waiting for threads of groups


def _trainer(variant: Variant, folder: Path, report: Path) -> Any:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(
        output_dir=str(folder / "run"),
        plan=variant.plan,
        per_device_train_batch_size=1,
        max_steps=variant.steps,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_timeout=int(TIMEOUT.total_seconds()),
        stall_timeout=0,  # a survivor that finds out who was killed would take seconds
        **variant.arguments(),
    )
    data = {"train_dataset": PackedRows(10, 0), "data_collator": collate}
    return OmniTrainer(model=variant.model(), args=arguments, callbacks=[_Report(report)], **data)


def _leave_result(trainer: Any, folder: Path) -> None:
    from hf_veomni.checkpoint.state import optimizer_state

    found = {**trainer.model.state_dict(), **optimizer_state(trainer.model, trainer.optimizer)}
    state = {name: full(value) for name, value in found.items() if isinstance(value, torch.Tensor)}
    if dist.get_rank() == 0:
        torch.save(state, folder / "result.part")
        os.replace(folder / "result.part", folder / RESULT)
    dist.barrier()
