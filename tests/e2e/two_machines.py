"""What `test_two_machines.py` launches: a mixture of experts, HSDP across the machines, SP and EP inside of each."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from tests.ranks.training import Run, outcome, tiny_mixtral

PLAN = "dp_replicate=2,sp=2,ep=2"


@dataclass(frozen=True)
class Experts(Run):
    def model(self) -> nn.Module:
        return tiny_mixtral()


class Slow(TrainerCallback):
    """Tells each step, and takes its time."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print("step", state.global_step, flush=True)
        time.sleep(0.5)


def main(result: str, slow: bool) -> None:
    from hf_veomni import OmniTrainer, OmniTrainingArguments

    run = Experts(arguments={"max_steps": 200, "stall_timeout": 20} if slow else {})
    arguments = OmniTrainingArguments(**run.all_arguments())  # the plan is the launcher's
    trainer = OmniTrainer(model=run.model(), args=arguments, callbacks=[Slow()] if slow else [], **run.data())
    assert str(arguments.plan).startswith(PLAN), arguments.plan
    found = outcome(trainer, trainer.train().training_loss)
    if dist.get_rank() == 0:
        torch.save(vars(found), result)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "slow")
