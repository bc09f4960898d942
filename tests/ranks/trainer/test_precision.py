"""bf16 under a plan: masters and reductions in fp32, gathers and matmuls in bf16, close to the stock Trainer's run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

from tests.ranks.training import Run, outcome, relative, train_stock

# bf16 keeps 8 bits, and the order of sums decides the last ones.
LOSS, NORM = 1e-2, 5e-2


def _train(plan: str, run: Run) -> tuple[Any, set[torch.dtype], set[torch.dtype]]:
    """The outcome, and the dtypes of the gathered parameters and of the gradients."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    gathered: set[torch.dtype] = set()
    gradients: set[torch.dtype] = set()

    class Noting(OmniTrainer):
        def _clip_grad_norm(self, model: Any) -> Any:
            gradients.update(p.grad.dtype for p in model.parameters() if p.grad is not None)
            return super()._clip_grad_norm(model)

    trainer = Noting(model=run.model(), args=OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data())
    for module in trainer.model.modules():
        if type(module).__name__.endswith("DecoderLayer"):
            assert isinstance(module, FSDPModule)
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda linear, args: gathered.add(linear.weight.dtype))
    found = outcome(trainer, trainer.train().training_loss)
    return found, gathered, gradients


@pytest.mark.parametrize(("plan", "world", "data_ranks"), [("sp=2", 2, 1), ("sp=2,dp_shard=2", 4, 2)])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_bf16_trains_as_the_stock_trainer(ranks, plan, world, data_ranks, lora):
    arguments = {"bf16": True, "eval_strategy": "epoch", "per_device_eval_batch_size": 3}
    run = Run(lora=lora, plain=True, eval_rows=3, arguments=arguments)
    expected = train_stock(run, data_ranks)
    for found, gathered, gradients in ranks(world).run(_train, plan, run, timeout=120):
        assert relative(found.losses, expected.losses) < LOSS
        assert relative(found.norms, expected.norms) < NORM
        losses = [entry["eval_loss"] for entry in found.evaluations]
        assert relative(losses, [entry["eval_loss"] for entry in expected.evaluations]) < LOSS
        assert all(weight.dtype == torch.float32 for weight in found.weights.values())
        assert gathered == {torch.bfloat16}, "half the bytes of a gather in fp32"
        assert gradients == {torch.float32}


def _full_eval(plan: str, run: Run) -> tuple[float, float, float]:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    trainer = OmniTrainer(model=run.model(), args=OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data())
    return _evaluate_train_evaluate(trainer)


def _evaluate_train_evaluate(trainer: Trainer) -> tuple[float, float, float]:
    before = trainer.evaluate()["eval_loss"]
    loss = trainer.train().training_loss
    after = trainer.evaluate()["eval_loss"]
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
    return before, loss, after


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("lora", "tied"), [(False, False), (False, True), (True, False)])
def test_bf16_full_eval_follows_the_stock_trainer(ranks, bf16, lora, tied):
    """An evaluation outside of training turns the model to bf16 for good, and what trains after it is bf16."""
    config = {"tie_word_embeddings": tied}
    arguments = {"bf16_full_eval": True, "bf16": bf16, "learning_rate": 0.05, "optim": "sgd"}
    run = Run(
        lora=lora,
        plain=True,
        config=config,
        eval_rows=4,
        arguments=arguments | {"per_device_eval_batch_size": 4},
    )
    stock = Trainer(model=run.model(), args=TrainingArguments(**run.all_arguments()), **run.data())
    expected = _evaluate_train_evaluate(stock)
    for found in ranks(2).run(_full_eval, "sp=2", run, timeout=60):
        assert relative(list(found), list(expected)) < LOSS


def _full_eval_after_training(plan: str, bf16: bool) -> None:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run(plain=True, eval_rows=2, arguments={"bf16_full_eval": True, "bf16": bf16, "max_steps": 1})
    trainer = OmniTrainer(model=run.model(), args=OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data())
    trainer.train()
    trainer.evaluate()


@pytest.mark.parametrize(("plan", "bf16"), [("sp=2", False), ("sp=2", True), ("dp_shard=2", False)])
def test_bf16_full_eval_after_training_is_refused(ranks, plan, bf16):
    ranks(2).raises(_full_eval_after_training, plan, bf16, match="`bf16_full_eval` .True. would cast", timeout=60)
