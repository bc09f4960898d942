"""Terms of a loss over the parameters themselves: those of the stock trainer in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tests.models import build_model
from tests.ranks.parity import relative_error, whole
from tests.ranks.training import Outcome, Run, assert_same_training, outcome, tiny_mixtral


def _squares(model: Any, start: Any) -> Tensor:
    return sum(p.pow(2).sum() for p in model.parameters() if p.requires_grad)  # type: ignore[return-value]


def _norms(model: Any, start: Any) -> Tensor:
    return torch.stack([p.norm() for _, p in model.named_parameters()]).sum()


def _absolute(model: Any, start: Any) -> Tensor:
    total = torch.zeros(())
    for p in model.parameters():
        total = total + p.abs().sum()
    return total


def _one_norm(model: Any, start: Any) -> Tensor:
    return torch.cat([p.flatten() for p in model.parameters()]).norm()


def _distances(model: Any, start: dict[str, Tensor]) -> Tensor:
    """From weights that every rank holds whole (L2-SP, elastic weights, proximal terms)."""
    return sum(((p - start[name]) ** 2).sum() for name, p in model.named_parameters())  # type: ignore[return-value]


def _orthogonality(model: Any, start: Any) -> Tensor:
    weight = next(p for name, p in model.named_parameters() if "v_proj" in name)
    return (weight @ weight.T - torch.eye(weight.shape[0])).pow(2).sum()


def _some_rows(model: Any, start: Any) -> Tensor:
    return model.get_input_embeddings().weight[torch.tensor([3, 59])].pow(2).sum()


def _weights(model: Any) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if p.dim() > 1 and "layers.0" in name]


def _spread(model: Any, start: Any) -> Tensor:
    """Of gradients that DTensor would place otherwise than the parameters."""
    return sum(w.std() + (w[:8] ** 2).sum() + 1e-3 * w.sum() ** 2 for w in _weights(model))  # type: ignore[return-value]


def _spectral(model: Any, start: Any) -> Tensor:
    return sum(torch.linalg.svdvals(w).max() + w.softmax(0).square().sum() for w in _weights(model))  # type: ignore


def _rows(model: Any, start: Any) -> Tensor:
    """A norm over the sharded axis, whose parts DTensor adds up as if they were sums."""
    return sum(w.norm(dim=0).sum() + w.norm(dim=1).sum() for w in _weights(model))  # type: ignore[return-value]


def _mean_distances(model: Any, start: dict[str, Tensor]) -> Tensor:
    named = dict(model.named_parameters())
    errors = (F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.l1_loss)
    return sum(error(named[name], start[name]) for name in start for error in errors)  # type: ignore[return-value]


def _scaled(model: Any, start: Any) -> Tensor:
    """By numbers that are read on the host."""
    return sum(p.square().sum() / (1 + p.norm().item() + float(p.sum())) for p in model.parameters())  # type: ignore


def _pruned(model: Any, start: Any) -> Tensor:
    """Parts chosen by masks: plain ones, and those of the weights."""
    total = torch.zeros(())
    for w in _weights(model):
        mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > 0.5
        total = total + w[mask].square().sum() + w.sum() * (w > 0).any() + w.quantile(0.3) + (w.T @ w).trace()
    return total


TERMS = {f.__name__.strip("_"): f for f in (_squares, _norms, _absolute, _one_norm, _distances, _orthogonality)}
TERMS["some_rows"] = _some_rows
OTHERS = {f.__name__.strip("_"): f for f in (_spread, _spectral, _rows, _mean_distances, _scaled, _pruned)}


def _share(trainer: Any, model: Any) -> int:
    """By what a mean over batches is divided for a trainer that adds up what it gets for those of a step."""
    return trainer.current_gradient_accumulation_steps if model.training and trainer.loss_is_scaled_for_ga else 1


class _Penalty:
    """The model's loss, and a term over parameters, computed before the forward or after it."""

    term, before = "squares", False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        term = TERMS[self.term](model, self.start) if self.before else None
        found = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        term = TERMS[self.term](model, self.start) if term is None else term
        loss = found[0] + 0.01 * term / _share(self, model)
        return (loss, found[1]) if return_outputs else loss


class _PenaltyAlone(_Penalty):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = 0.01 * TERMS[self.term](model, self.start)
        loss = loss / _share(self, model)
        return (loss, model(**inputs)) if return_outputs else loss


def _start(run: Run) -> dict[str, Tensor]:
    return {name: 0.9 * p.detach() for name, p in run.model().named_parameters()}


def _run(**more: Any) -> Run:
    # An odd number of rows: at the end of the epoch one data rank only keeps the other company.
    return Run(plain=True, num_rows=7, eval_rows=3, **more, arguments={"num_train_epochs": 1, "max_grad_norm": 100.0})


def _stock(term: str, run: Run, ranks: int, kind: type = _Penalty) -> Outcome:
    arguments = run.all_arguments(eval_strategy="epoch", per_device_eval_batch_size=4)
    arguments["gradient_accumulation_steps"] *= ranks
    # It adds up what it gets for the batches of a step, and so must be told of the mean.
    owner = type("Stock", (kind, Trainer), {"loss_is_scaled_for_ga": True, "term": term, "start": _start(run)})
    trainer = owner(model=run.model(), args=TrainingArguments(**arguments), **run.data())
    return outcome(trainer, trainer.train().training_loss)


def _omni(plan: str, term: str, run: Run, before: bool = False, kind: type = _Penalty) -> Outcome:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    more = {"term": term, "start": _start(run), "before": before, "__module__": __name__}
    arguments = run.all_arguments(eval_strategy="epoch", per_device_eval_batch_size=4, plan=plan)
    trainer = type("Mine", (kind, OmniTrainer), more)(run.model(), OmniTrainingArguments(**arguments), **run.data())
    return outcome(trainer, trainer.train().training_loss)


def _assert_same(found: Outcome, expected: Outcome) -> None:
    assert_same_training(found, expected)
    assert len(found.evaluations) == len(expected.evaluations) == 1
    assert found.evaluations[0]["eval_loss"] == pytest.approx(expected.evaluations[0]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("term", list(TERMS))
@pytest.mark.parametrize("plan", ["dp_shard=2", "sp=2"])
def test_a_term_over_parameters_equals_one_process(ranks, plan, term):
    run = _run()
    expected = _stock(term, run, 2 if "dp" in plan else 1)
    for found in ranks(2).run(_omni, plan, term, run, timeout=120):
        _assert_same(found, expected)


@pytest.mark.parametrize("plan", ["sp=2,dp_shard=2", "dp_replicate=2,dp_shard=2"])
def test_over_both_meshes_and_with_adapters(ranks, plan):
    run = _run(lora=True)
    expected = _stock("squares", run, 2 if "sp" in plan else 4)
    for found in ranks(4).run(_omni, plan, "squares", run, timeout=120):
        _assert_same(found, expected)


@pytest.mark.parametrize("term", ["squares", "one_norm"])
def test_a_term_that_is_computed_before_the_forward(ranks, term):
    run = _run()
    expected = _stock(term, run, 2)
    for found in ranks(2).run(_omni, "dp_shard=2", term, run, True, timeout=120):
        _assert_same(found, expected)


def test_a_loss_of_parameters_alone(ranks):
    run = _run()
    expected = _stock("squares", run, 2, _PenaltyAlone)
    for found in ranks(2).run(_omni, "dp_shard=2", "squares", run, False, _PenaltyAlone, timeout=120):
        _assert_same(found, expected)


@dataclass(frozen=True)
class _Mixture(Run):
    def model(self) -> Any:
        return tiny_mixtral(**self.config)


@pytest.mark.parametrize("plan", ["sp=2,dp_shard=2,ep=2", "dp_replicate=2,sp=2,ep=2"])
@pytest.mark.parametrize("term", ["squares", "norms"])
def test_experts_that_other_ranks_have_count_too(ranks, plan, term):
    run = _Mixture(**vars(_run()))
    expected = _stock(term, run, 2)
    for found in ranks(4).run(_omni, plan, term, run, timeout=120):
        assert_same_training(found, expected)


def test_compiled_layers_do_not_see_it(ranks):
    run = _run()
    expected = _stock("squares", run, 2)
    run.arguments.update(torch_compile=True, torch_compile_backend="aot_eager")
    for found in ranks(2).run(_omni, "dp_shard=2", "squares", run, timeout=180):
        _assert_same(found, expected)


def _loop(plan: str, term: Any = _squares) -> list[Tensor]:
    """Loss and gradients, in a loop without a Trainer."""
    from hf_veomni import prepare_omni, sharded_arithmetic

    model: Any = build_model("llama")
    start = {name: 0.9 * p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(3, 60, (1, 32), generator=torch.Generator().manual_seed(1))
    if plan:
        model = prepare_omni(model, plan)
        with sharded_arithmetic(model):
            loss = model(input_ids=ids, labels=ids).loss + 0.01 * term(model, start)
    else:
        loss = model(input_ids=ids, labels=ids).loss + 0.01 * term(model, start)
    loss.backward()
    return [loss.detach(), *(whole(p.grad).clone() for p in model.parameters())]


def test_in_a_loop_of_ones_own(ranks):
    expected = _loop("")
    for found in ranks(2).run(_loop, "sp=2"):
        assert max(relative_error(*pair) for pair in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
@pytest.mark.parametrize("term", list(OTHERS))
def test_what_dtensor_answers_otherwise(ranks, plan, term):
    """Of these it gives numbers of one rank, or gradients that are not where the parameter is."""
    expected = _loop("", OTHERS[term])
    for found in ranks(2).run(_loop, plan, OTHERS[term]):
        assert max(relative_error(*pair) for pair in zip(found, expected, strict=True)) < 1e-5


def _looks_and_changes() -> tuple[list[int], float, list[float]]:
    """What describes a parameter on one rank alone; a change in place of a shard."""
    from hf_veomni import prepare_omni, sharded_arithmetic

    model: Any = prepare_omni(build_model("llama"), "sp=2")
    weight = model.get_input_embeddings().weight
    with sharded_arithmetic(model):
        sizes = [weight.numel(), weight.dim(), weight.size(0), len(weight)] if dist.get_rank() == 0 else []
        with torch.no_grad():
            weight.copy_(torch.full(weight.shape, 0.5))
            assert int((weight * 2).sum()) == weight.numel() and int(weight[:1, :1] * 4) == 2
            weight.mul_(2)
    return sizes, float(whole(weight).mean()), [float(whole(weight).min()), float(whole(weight).max())]


def test_looking_gathers_nothing_and_changes_arrive(ranks):
    weight = build_model("llama").get_input_embeddings().weight
    (sizes, mean, ends), (_, other, _) = ranks(2).run(_looks_and_changes, timeout=60)
    assert sizes == [weight.numel(), 2, len(weight), len(weight)]
    assert mean == other == 1 and ends == [1, 1]
