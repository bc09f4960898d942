"""From any plan to any other: all of the state is the same, and so are the losses that follow.

The reference is the run that goes on under the plan it began with. In double precision, so that only a wrong state or
another sample can make a difference, not the order of a sum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_veomni import ParallelPlan
from tests.multimodal import qwen3_vl
from tests.ranks.training import Run, adapt_experts, full, lora_model, relative, tiny_mixtral, tiny_model

DENSE = ["sp=4", "dp_shard=4", "sp=2,dp_shard=2", "dp_replicate=2,dp_shard=2", "dp_replicate=2,sp=2"]
EXPERTS = ["sp=4,ep=2", "dp_shard=4,ep=4", "sp=2,dp_shard=2,ep=2", "dp_replicate=2,sp=2,ep=2", "dp_shard=4"]
PLANS = {"dense": DENSE, "lora": DENSE, "experts": EXPERTS, "experts-lora": EXPERTS, "vlm": DENSE}
SAVINGS: list[dict[str, Any]] = [{}, {"sharded_weights": True}, {"async_save": True}]
SAVED, STEPS, ROWS = 2, 7, 4  # rows of a step, on all data ranks


def _model(kind: str) -> Any:
    if kind == "vlm":
        owner, config, _ = qwen3_vl()
        torch.manual_seed(1)
        return owner(config).double()
    if kind in ("dense", "lora"):
        return (tiny_model() if kind == "dense" else lora_model()).double()
    model: Any = tiny_mixtral()
    model.set_experts_implementation("eager")  # torch has no grouped products in double precision
    return (model if kind == "experts" else adapt_experts(model)).double()


class _AtStep(TrainerCallback):
    """The whole state with which the step after the checkpoint begins."""

    trainer: Any = None
    state: dict[str, torch.Tensor] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SAVED:
            from hf_veomni.checkpoint.state import optimizer_state

            model, optimizer = self.trainer.model, self.trainer.optimizer
            found = {**model.state_dict(), **optimizer_state(model, optimizer)}
            self.state = {n: full(t).clone() for n, t in found.items() if isinstance(t, torch.Tensor)}


def _train(kind: str, plan: str, folder: Path, resume: str | None, **saving: Any) -> tuple[dict, list[float], int]:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    resolved = ParallelPlan.from_string(plan).resolve(4)
    accumulation = ROWS // (resolved.dp_replicate_size * (resolved.dp_shard_size or 1))
    run = Run(num_rows=3 * ROWS, plain=kind == "vlm")
    arguments = run.all_arguments(
        plan=plan, output_dir=str(folder), gradient_accumulation_steps=accumulation, max_steps=STEPS, **saving
    )
    note = _AtStep()
    data = run.data()
    trainer = OmniTrainer(_model(kind), OmniTrainingArguments(**arguments), callbacks=[note], **data)
    note.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return note.state or {}, losses, trainer.state.num_input_tokens_seen


def _from_one_to_others(kind: str, plan: str, others: list[str], folder: Path, saving: dict[str, Any]) -> list:
    save = {"save_strategy": "steps", "save_steps": SAVED, **saving}
    found = [_train(kind, plan, folder, None, **save)]
    checkpoint = str(folder / f"checkpoint-{SAVED}")
    return found + [_train(kind, other, folder, checkpoint) for other in others]


def _check(ranks: Any, kind: str, plan: str, others: list[str], folder: Path, saving: dict[str, Any]) -> None:
    for undisturbed, *resumed in ranks(4).run(
        _from_one_to_others, kind, plan, others, folder, saving, timeout=60 + 60 * len(others)
    ):
        state, losses, tokens = undisturbed
        assert any("exp_avg" in name for name in state) and len(losses) == STEPS
        for other, (found, continued, seen) in zip(others, resumed, strict=True):
            assert found.keys() == state.keys(), other
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items()), other
            assert relative(continued[-(STEPS - SAVED) :], losses[SAVED:]) < 1e-6, other
            assert seen == tokens, other


@pytest.mark.parametrize(
    ("kind", "plan", "other", "saving"),
    [
        ("dense", "sp=2,dp_shard=2", "dp_replicate=2,dp_shard=2", 1),
        ("lora", "dp_replicate=2,sp=2", "sp=4", 2),
        ("experts-lora", "sp=4,ep=2", "dp_shard=4,ep=4", 1),
        ("experts", "dp_shard=4,ep=4", "dp_replicate=2,sp=2,ep=2", 2),
    ],
)
def test_resume_under_another_plan(ranks, tmp_path, kind, plan, other, saving):
    _check(ranks, kind, plan, [other], tmp_path, SAVINGS[saving])


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("place", range(5))
def test_every_plan_to_every_other(ranks, tmp_path, kind, place):
    """Twenty ordered pairs for each kind of model; the three ways to save in turn."""
    plan, others = PLANS[kind][place], [other for other in PLANS[kind] if other != PLANS[kind][place]]
    _check(ranks, kind, plan, others, tmp_path, SAVINGS[place % 3])
