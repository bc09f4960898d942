"""A signal to any rank: all save at the same step and end, and the run goes on as if there had been none."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_veomni.checkpoint.manifest import find_damage
from tests.ranks.training import Run, full

STEPS = 8


class _Send(TrainerCallback):
    """Sends this process signals at the end of step 2: `numbers` there, and `again` while the checkpoint is saved."""

    def __init__(self, *numbers: int, again: int | None = None) -> None:
        self.numbers, self.again = numbers, again

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def _run(dropout: float = 0.1) -> Run:
    arguments = {"max_steps": STEPS, "gradient_accumulation_steps": 1, "enable_jit_checkpoint": True}
    return Run(num_rows=6, config={"attention_dropout": dropout}, arguments=arguments)


def _trainer(
    plan: str, folder: Path, callback: TrainerCallback | None = None, dropout: float = 0.1, **arguments: Any
) -> Any:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    class SignalledWhileItSaves(OmniTrainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if isinstance(callback, _Send) and callback.again is not None:
                os.kill(os.getpid(), callback.again)
            super()._save_optimizer_and_scheduler(output_dir)

    run = _run(dropout)
    args = OmniTrainingArguments(**run.all_arguments(plan=plan, output_dir=str(folder), **arguments))
    callbacks = [callback] if callback is not None else []
    return SignalledWhileItSaves(model=run.model(), args=args, callbacks=callbacks, **run.data())


def _weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: full(tensor).clone() for name, tensor in trainer.model.state_dict().items()}


def _stop(plan: str, folder: Path, rank: int, numbers: tuple[int, ...], again: int | None, **arguments: Any) -> Any:
    """The exit code and the checkpoint of a run of which one rank gets signals."""
    mine = not dist.is_initialized() or dist.get_rank() == rank
    trainer = _trainer(plan, folder, _Send(*numbers, again=again) if mine else None, **arguments)
    try:
        trainer.train()
    except SystemExit as end:
        return end.code, getattr(end, "checkpoint", None), trainer.state.global_step
    return None


def _go_on(plan: str, folder: Path, resume: bool, **arguments: Any) -> tuple[int, dict[str, torch.Tensor]]:
    trainer = _trainer(plan, folder, **arguments)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer._initial_global_step, _weights(trainer)


@pytest.mark.parametrize("saving", [{}, {"async_save": True}], ids=["plain", "async"])
@pytest.mark.parametrize(
    ("rank", "numbers", "again"),
    [
        (1, (signal.SIGUSR1,), None),
        (0, (signal.SIGTERM, signal.SIGUSR1), None),
        (1, (signal.SIGTERM,), signal.SIGTERM),
    ],
    ids=["USR1", "two", "while saving"],
)
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(ranks, tmp_path, rank, numbers, again, saving):
    """Between step 2, at whose end it comes, and step 4; what goes on from there ends like a run without a signal."""
    found = ranks(2).run(_stop, "dp_shard=2", tmp_path / "run", rank, numbers, again, **saving, timeout=60)
    folder = tmp_path / "run" / "checkpoint-3"
    assert found == [(75, str(folder), 3)] * 2
    assert find_damage(folder, contents=True) is None
    resumed = ranks(2).run(_go_on, "dp_shard=2", tmp_path / "run", True, **saving, timeout=60)
    expected = ranks(2).run(_go_on, "dp_shard=2", tmp_path / "other", False, timeout=60)
    assert [begun for begun, _ in resumed] == [3, 3]
    for name, weight in expected[0][1].items():
        assert torch.equal(resumed[0][1][name], weight), name


class _SendInEvaluation(TrainerCallback):
    """At its first batch in training."""

    batches = 0

    def __init__(self, sends: bool) -> None:
        self.sends = sends

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches += 1
        if self.sends and self.batches == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _stop_evaluation(plan: str, folder: Path) -> tuple[Any, int, int]:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run(arguments={"enable_jit_checkpoint": True, "eval_strategy": "steps", "eval_steps": 2}, eval_rows=40)
    args = OmniTrainingArguments(**run.all_arguments(plan=plan, output_dir=str(folder)))
    callback = _SendInEvaluation(not dist.is_initialized() or dist.get_rank() == 1)
    trainer = OmniTrainer(model=run.model(), args=args, callbacks=[callback], **run.data())
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 75
    assert find_damage(folder / "checkpoint-2", contents=True) is None
    assert trainer.evaluate()["eval_loss"] > 0  # outside of training nobody is interrupted
    return end.value.code, trainer.state.global_step, callback.batches


@pytest.mark.parametrize("world", [1, 2])
def test_an_evaluation_gives_way(ranks, tmp_path, world):
    """It does not go on to its end, which may be later than the scheduler waits."""
    found = [_stop_evaluation("", tmp_path)] if world == 1 else ranks(2).run(
        _stop_evaluation, "dp_shard=2", tmp_path, timeout=60
    )  # fmt: skip
    whole = 20 // world
    assert found == [(75, 2, 1 + whole)] * world


def test_one_process_saves_at_the_step_itself(tmp_path: Path) -> None:
    """Where the stock Trainer's own callback waits three seconds and saves at whatever step comes then."""
    assert _stop("", tmp_path / "run", 0, (signal.SIGTERM,), signal.SIGTERM, dropout=0.0) == (
        75, str(tmp_path / "run" / "checkpoint-2"), 2,
    )  # fmt: skip
    begun, found = _go_on("", tmp_path / "run", True, dropout=0.0)
    run = _run(dropout=0.0)
    arguments = TrainingArguments(**run.all_arguments(output_dir=str(tmp_path / "stock"), enable_jit_checkpoint=False))
    stock = Trainer(model=run.model(), args=arguments, **run.data())
    stock.train()
    assert begun == 2
    for name, weight in stock.model.state_dict().items():
        assert (found[name] - weight).abs().max() < 1e-5, name


def test_without_the_argument_signals_do_what_they_did(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        trainer = _trainer("", tmp_path, _Send(signal.SIGUSR1), enable_jit_checkpoint=False)
        trainer.train()
        assert heard == [signal.SIGUSR1] and trainer.state.global_step == STEPS
        assert _stop("", tmp_path, 0, (signal.SIGUSR1,), None) is not None and len(heard) == 1
        os.kill(os.getpid(), signal.SIGUSR1)  # put back when training ended
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def _finish(plan: str, folder: Path, resume: bool) -> tuple[int, dict[str, torch.Tensor]]:
    trainer = _trainer(plan, folder, save_strategy="steps", save_steps=4, enable_jit_checkpoint=False)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer.state.global_step, _weights(trainer)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_at_its_end_that_is_started_again_trains_no_further(ranks, tmp_path, world):
    """As where it was killed after its last checkpoint, in the middle of an epoch."""
    arguments = ("dp_shard=2" if world == 2 else "", tmp_path)
    ends = [
        [_finish(*arguments, resume)] if world == 1 else ranks(2).run(_finish, *arguments, resume, timeout=60)
        for resume in (False, True)
    ]
    for (step, weights), (again, resumed) in zip(*ends, strict=True):
        assert step == again == STEPS
        assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
