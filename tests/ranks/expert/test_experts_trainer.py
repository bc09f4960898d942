"""OmniTrainer with experts sharded over ranks: trains, saves, resumes and evaluates as one process does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.ranks.training import (
    Outcome,
    Run,
    adapt_experts,
    assert_same_training,
    loss_of_all_targets,
    outcome,
    tiny_mixtral,
)

PLANS = [
    (2, "sp=2,ep=2", 1),
    (2, "dp_shard=2,ep=2", 2),
    (4, "sp=2,dp_shard=2,ep=2", 2),
    (4, "sp=2,dp_shard=2,ep=4", 2),
    (4, "dp_replicate=2,sp=2,ep=2", 2),
]
plans = pytest.mark.parametrize(("world", "plan", "data_ranks"), PLANS, ids=[plan for _, plan, _ in PLANS])


@dataclass(frozen=True)
class ExpertRun(Run):
    """A run of a small Mixtral."""

    def model(self) -> nn.Module:
        return adapt_experts(tiny_mixtral(**self.config)) if self.lora else tiny_mixtral(**self.config)


def _trainer(plan: str, run: ExpertRun, directory: Path) -> Any:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(**run.all_arguments(plan=plan, output_dir=str(directory)))
    return OmniTrainer(model=run.model(), args=arguments, **run.data())


def _outcome(trainer: Any, train_loss: float) -> Outcome:
    """With the weights as files keep them: adapters in PEFT's layout."""
    from hf_veomni.checkpoint import gather_full_state

    found = outcome(trainer, train_loss)
    return replace(found, weights={n: t.clone() for n, t in gather_full_state(trainer.model, keep=True).items()})


def _train(plan: str, run: ExpertRun, directory: Path) -> Outcome:
    trainer = _trainer(plan, run, directory)
    return _outcome(trainer, trainer.train().training_loss)


def _train_stock(run: ExpertRun, data_ranks: int) -> Outcome:
    arguments = run.all_arguments()
    arguments["gradient_accumulation_steps"] *= data_ranks
    trainer = Trainer(model=run.model(), args=TrainingArguments(**arguments), **run.data())
    return outcome(trainer, trainer.train().training_loss)


@plans
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_equals_one_process(ranks, tmp_path, world, plan, data_ranks, lora):
    run = ExpertRun(lora=lora)
    expected = _train_stock(run, data_ranks)
    assert min(expected.norms) > 0.5, "clipping must be active, over dense parameters and experts"
    for found in ranks(world).run(_train, plan, run, tmp_path, timeout=120):
        assert_same_training(found, replace(expected, state=found.state))
        assert found.state["global_step"] == expected.state["global_step"]


def _router_run() -> ExpertRun:
    return ExpertRun(config={"output_router_logits": True, "router_aux_loss_coef": 0.5}, num_rows=8)


def test_router_loss_does_not_depend_on_the_sequence_and_expert_ranks(ranks, tmp_path):
    """Under accumulation, with uneven token counts. One process computes each micro-batch's loss as these do."""
    run = _router_run()
    expected = _train("", run, tmp_path)
    for found in ranks(4).run(_train, "sp=4,ep=2", run, tmp_path, timeout=120):
        assert_same_training(found, expected)


def _save(plan: str, run: ExpertRun, directory: Path) -> tuple[dict[str, torch.Tensor], float]:
    from hf_veomni.checkpoint import gather_full_state

    trainer = _trainer(plan, run, directory)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(directory / "saved"))
    return {name: t.clone() for name, t in gather_full_state(trainer.model, keep=True).items()}, loss


def _evaluate(model: nn.Module, run: ExpertRun, directory: Path) -> float:
    arguments = TrainingArguments(**run.all_arguments(output_dir=str(directory)))
    return loss_of_all_targets(Trainer(model=model, args=arguments, **run.data()), run.dataset(run.eval_rows, 5))


@pytest.mark.parametrize(("world", "plan"), [(2, "sp=2,ep=2"), (4, "sp=2,dp_shard=2,ep=2")])
def test_saved_model_opens_in_plain_transformers(ranks, tmp_path, world, plan):
    run = ExpertRun(eval_rows=4, arguments={"max_steps": 2, "per_device_eval_batch_size": 1})
    weights, loss = ranks(world).run(_save, plan, run, tmp_path, timeout=120)[0]
    model, info = cast(Any, AutoModelForCausalLM).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    stored = model.state_dict()
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in weights.items())
    assert _evaluate(model, run, tmp_path) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("world", "plan"), [(2, "sp=2,ep=2"), (4, "sp=2,dp_shard=2,ep=4"), (2, "sp=2")])
def test_saved_adapter_opens_and_merges_in_plain_peft(ranks, tmp_path, world, plan):
    """Same tensors, same logits and same merged weights as PEFT's own dense path has with them."""
    run = ExpertRun(lora=True, eval_rows=4, arguments={"max_steps": 2, "per_device_eval_batch_size": 1})
    weights, loss = ranks(world).run(_save, plan, run, tmp_path, timeout=120)[0]
    opened = PeftModel.from_pretrained(tiny_mixtral(), tmp_path / "saved")
    found = opened.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert _evaluate(opened, run, tmp_path) == pytest.approx(loss, rel=1e-5)
    reference = adapt_experts(tiny_mixtral())
    reference.load_state_dict(weights)
    merged, expected = (cast(Any, model).merge_and_unload() for model in (opened, reference))
    for (name, one), (_, other) in zip(merged.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def _train_and_resume(plan: str, other: str, run: ExpertRun, directory: Path) -> tuple[Outcome, Outcome]:
    whole = _trainer(plan, run, directory)
    uninterrupted = _outcome(whole, whole.train().training_loss)
    dist.barrier()
    resumed = _trainer(other, run, directory)
    checkpoint = str(directory / f"checkpoint-{run.arguments['save_steps']}")
    return uninterrupted, _outcome(resumed, resumed.train(resume_from_checkpoint=checkpoint).training_loss)


SAME, FEWER, OTHER = (
    ("sp=2,dp_shard=2,ep=2", "sp=2,dp_shard=2,ep=2", 0.0),
    ("sp=2,dp_shard=2,ep=4", "sp=2,dp_shard=2", 1e-5),
    ("sp=2,dp_shard=2", "dp_replicate=2,sp=2,ep=2", 1e-5),
)
SLOW = [(*SAME, True), (*FEWER, False), (*FEWER, True), (*OTHER, False)]


@pytest.mark.parametrize(
    ("plan", "other", "tolerance", "lora"),
    [(*SAME, False), (*OTHER, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_resume_under_the_same_plan_and_another(ranks, tmp_path, plan, other, tolerance, lora):
    run = ExpertRun(lora=lora, num_rows=16, arguments={"save_strategy": "steps", "save_steps": 3, "max_steps": 6})
    for whole, resumed in ranks(4).run(_train_and_resume, plan, other, run, tmp_path, timeout=180):
        assert max(abs(a - b) for a, b in zip(resumed.losses, whole.losses, strict=True)) <= tolerance
        for name, weight in whole.weights.items():
            assert (resumed.weights[name] - weight).abs().max() <= tolerance, name


def _generate(plan: str) -> list[int]:
    from hf_veomni import prepare_omni

    model: Any = prepare_omni(tiny_mixtral(), plan).eval()
    ids = torch.arange(5, 16)[None]
    return model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist()


def test_generation_equals_one_process(ranks):
    model: Any = tiny_mixtral().eval()
    expected = model.generate(torch.arange(5, 16)[None], max_new_tokens=5, do_sample=False)[0].tolist()
    assert ranks(4).run(_generate, "sp=2,dp_shard=2,ep=4", timeout=60) == [expected] * 4
