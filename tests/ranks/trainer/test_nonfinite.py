"""A gradient that is not finite is named, on every rank, by step, rank, batch and module, and harms no weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.ranks.training import Run, full

DOWN = "model.layers.1.mlp.down_proj"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _break(trainer: Any, module: str, rank: int, steps: tuple[int, ...], *, backward: bool, value: float) -> None:
    """Let a module return `value`, or get it as a gradient, on one rank in some steps (by number of those done)."""

    def spoil(owner: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if _rank() != rank or trainer.state.global_step not in steps or not torch.is_grad_enabled():
            return None
        mask = torch.zeros_like(output)
        mask.view(-1)[0] = value
        if not backward:
            return output + mask
        output.register_hook(lambda gradient: gradient + mask)
        return None

    trainer.model.get_submodule(module).register_forward_hook(spoil)


def _trainer(run: Run, plan: str, **arguments: Any) -> Any:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    args = OmniTrainingArguments(**run.all_arguments(plan=plan, **arguments))
    return OmniTrainer(model=run.model(), args=args, **run.data())


def _train(plan: str, spoil: dict[str, Any], **arguments: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    trainer = _trainer(Run(), plan, **arguments)
    before = {name: full(tensor).clone() for name, tensor in trainer.model.state_dict().items()}
    _break(trainer, **spoil)
    try:
        trainer.train()
    except ArithmeticError as error:
        step = trainer.state.global_step
        if not step:
            for name, tensor in trainer.model.state_dict().items():
                assert torch.equal(full(tensor), before[name]), name
        raise ArithmeticError(f"{type(error).__name__} after {step}: {error}") from error
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {name: full(tensor).clone() for name, tensor in trainer.model.state_dict().items()}, norms


@pytest.mark.parametrize("plan", ["dp_shard=2", "sp=2", "dp_replicate=2", "dp_shard=2,overlap=pairs"])
@pytest.mark.parametrize(
    ("backward", "value", "text"),
    [(False, math.nan, f"nan in what `{DOWN}` \\(Linear\\) returned"), (False, math.inf, f"inf in what `{DOWN}`"),
     (True, math.inf, f"inf in the gradient of what `{DOWN}` returned")],
    ids=["nan", "inf", "gradient"],
)  # fmt: skip
def test_the_first_value_is_named_on_every_rank(ranks, plan, backward, value, text):
    spoil = {"module": DOWN, "rank": 1, "steps": (1,), "backward": backward, "value": value}
    group = "0" if plan == "sp=2" else "1"
    match = r"NotFiniteError after 1: The gradient norm of step 2 is (nan|inf)\. It began on rank 1 in step 2, .*"
    match += rf"data rank {group} in epoch 0, .*input_ids \[1, \d+\].* with {text}"
    ranks(2).raises(_train, plan, spoil, match=match, kind="ArithmeticError", timeout=60)


def test_the_first_step_leaves_the_weights(ranks):
    spoil = {"module": DOWN, "rank": 0, "steps": (0,), "backward": False, "value": math.nan}
    ranks(2).raises(_train, "dp_shard=2", spoil, match="weights are as before", kind="ArithmeticError", timeout=60)


class _LeaveOut(TrainerCallback):
    """The update of step 2 of a stock Trainer."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.model.zero_grad()


@pytest.mark.parametrize(("plan", "world"), [("", 1), ("dp_shard=2", 2), ("sp=2", 2)])
def test_a_skipped_step_is_one_without_an_update(ranks, plan, world):
    run = Run()
    arguments = run.all_arguments()
    arguments["gradient_accumulation_steps"] *= 1 if plan == "sp=2" else world
    stock = Trainer(model=run.model(), args=TrainingArguments(**arguments), **run.data())
    stock.add_callback(_LeaveOut(stock.model))
    stock.train()
    spoil = {"module": DOWN, "rank": world - 1, "steps": (1,), "backward": False, "value": math.nan}
    for weights, norms in (
        ranks(2).run(_train, plan, spoil, on_nonfinite="skip", timeout=60)
        if world == 2
        else [_train(plan, spoil, on_nonfinite="skip")]
    ):
        assert math.isnan(norms[1]) and all(math.isfinite(norm) for norm in norms[:1] + norms[2:])
        for name, weight in stock.model.state_dict().items():
            assert (weights[name] - weight).abs().max() < 1e-5, name


def test_skipping_ends_where_it_would_not_help() -> None:
    spoil = {"module": DOWN, "rank": 0, "steps": tuple(range(99)), "backward": False, "value": math.nan}
    with pytest.raises(ArithmeticError, match=r"10 steps in a row were left out"):
        _train("", spoil, on_nonfinite="skip", num_train_epochs=9)
    trainer = _trainer(Run(), "", on_nonfinite="skip")
    with torch.no_grad():
        trainer.model.get_submodule(DOWN).weight[0, 0] = math.nan
    with pytest.raises(ArithmeticError, match=rf"`{DOWN}` .*whose `weight` holds nan.*not finite before"):
        trainer.train()


def test_ignored_as_the_stock_trainer_does() -> None:
    spoil = {"module": DOWN, "rank": 0, "steps": (1,), "backward": False, "value": math.nan}
    weights, norms = _train("", spoil, on_nonfinite="ignore")
    run = Run()
    stock = Trainer(model=run.model(), args=TrainingArguments(**run.all_arguments()), **run.data())
    _break(stock, **spoil)
    stock.train()
    expected = stock.model.state_dict()
    assert any(weight.isnan().any() for weight in expected.values())
    assert math.isnan(norms[1])
    for name, weight in expected.items():
        assert torch.equal(weights[name].isnan(), weight.isnan()), name


def test_a_loss_alone_is_told_and_harms_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A NaN that no gradient comes from, as of a batch without targets."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    class Spoiled(OmniTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss + math.nan if self.state.global_step == 1 else loss

    run = Run()
    trainer = Spoiled(model=run.model(), args=OmniTrainingArguments(**run.all_arguments()), **run.data())
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        trainer.train()
    finally:
        logging.disable_propagation()
    assert "The loss of step 2, micro-batch 1 of 2" in caplog.text and "nan on rank 0" in caplog.text
    assert "step 1," not in caplog.text and "step 3," not in caplog.text
    stock = Trainer(model=run.model(), args=TrainingArguments(**run.all_arguments()), **run.data())
    stock.train()
    for name, weight in stock.model.state_dict().items():
        assert (trainer.model.state_dict()[name] - weight).abs().max() < 1e-5, name


@pytest.mark.parametrize("value", ["", "Stop", "continue"])
def test_another_policy_is_refused(value: str) -> None:
    from hf_veomni.trainer import OmniTrainingArguments

    with pytest.raises(ValueError, match=rf"`on_nonfinite` \('{value}'\) is unknown.*ignore, skip, stop"):
        OmniTrainingArguments(output_dir="x", on_nonfinite=value)
