"""Losses of one's own with two sequences in flight: means over a batch, and forwards without gradients beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.models import build_model, packed_batch
from tests.ranks.parity import relative_error, whole
from tests.ranks.trainer import test_losses as functions
from tests.ranks.trainer import test_overrides as overridden
from tests.ranks.training import Run

ROWS: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
}  # nothing to run beside a batch of two


@pytest.mark.parametrize("kind", ["last_token", "own_labels", "added"])
def test_an_overridden_loss_is_that_of_the_whole_batch(ranks, kind: str) -> None:
    """A mean over a batch is no sum of means over its halves."""
    run = overridden._run(**ROWS)
    expected = overridden._stock(kind, run, 1)
    for found in ranks(2).run(overridden._omni, "sp=2,overlap=pairs", kind, run, "keep", timeout=120):
        overridden._assert_same(found, expected)


def _function(plan: str, run: Run, name: str) -> Any:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(**functions._arguments(plan=plan, **run.arguments))
    function, _ = functions.FUNCTIONS[name]
    trainer = OmniTrainer(run.model(), arguments, compute_loss_func=function, **run.data())
    return functions.outcome(trainer, trainer.train().training_loss)


TIED = Run(plain=True, num_rows=7, config={"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("name", "run"),
    [("mean", Run(plain=True, num_rows=7, arguments=ROWS)), ("share", TIED)],
    ids=["a mean, rows", "the first one ends first"],
)
def test_a_function_sees_the_whole_batch(ranks, name: str, run: Run) -> None:
    """Tied embeddings belong to the root, so that it is the first sequence that is ahead, and ends first."""
    function, scaled = functions.FUNCTIONS[name]
    kind = type("Stock", (functions.Trainer,), {"loss_is_scaled_for_ga": scaled})
    arguments = functions.TrainingArguments(**functions._arguments(**run.arguments))
    stock = kind(run.model(), arguments, compute_loss_func=function, **run.data())
    expected = functions.outcome(stock, stock.train().training_loss)
    for found in ranks(2).run(_function, "sp=2,overlap=pairs", run, name, timeout=120):
        functions._assert_same(found, expected)


def _two_forwards(plan: str, at_once: bool, reference: str) -> tuple[list[float], dict[str, Tensor]]:
    """A loss that looks at the model, and without gradients at a reference: a second model, or itself."""
    from hf_veomni import prepare_omni, run_pair

    model: Any = prepare_omni(build_model("llama", dtype=torch.float64), plan)
    other: Any = prepare_omni(build_model("llama", dtype=torch.float64), plan) if reference == "model" else model
    batches = [packed_batch((9, 5, 14), seed=0), packed_batch((20, 8), seed=5)]

    def compute(batch: dict[str, Tensor]) -> Tensor:
        loss = model(**batch).loss
        with torch.no_grad():
            beside = other(**batch).loss
        return loss * (1 + beside)

    losses = run_pair(compute, *batches) if at_once else [compute(batch) for batch in batches]
    for loss in [losses[0] + losses[1]] if at_once else reversed(losses):
        loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return [loss.item() for loss in losses], gradients


@pytest.mark.parametrize("reference", ["model", "itself"])
def test_a_forward_without_gradients_beside_equals_one_after_the_other(ranks, reference: str) -> None:
    """When it ends in one sequence the other one may be inside of a layer, whose parameters must stay."""
    found = ranks(2).run(_two_forwards, "sp=2,overlap=pairs", True, reference, timeout=60)
    plain = ranks(2).run(_two_forwards, "sp=2", False, reference, timeout=60)
    for (losses, gradients), (wanted, expected) in zip(found, plain, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-12)
        assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-12


def _teacher(plan: str, at_once: bool) -> list[float]:
    """Losses of two steps with a teacher that is asked first, and whose weights change after each step."""
    from hf_veomni import prepare_omni, run_pair

    model, teacher = (prepare_omni(build_model("llama", dtype=torch.float64), plan) for _ in range(2))
    weights, losses = list(teacher.parameters()), []
    batches = [packed_batch((9, 5, 14), seed=0), packed_batch((20, 8), seed=5)]

    def compute(batch: dict[str, Tensor]) -> Any:
        with torch.no_grad():
            beside = teacher(**batch).loss
        return model(**batch).loss * (1 + beside)

    for _ in range(2):
        found = run_pair(compute, *batches) if at_once else [compute(batch) for batch in batches]
        losses += [loss.item() for loss in found]
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.1)
    return losses


def test_a_teacher_that_is_asked_first_has_its_new_weights_in_the_next_step(ranks) -> None:
    """Its head stays gathered after a forward without gradients only while another sequence is in its layers."""
    found = ranks(2).run(_teacher, "sp=2,overlap=pairs", True, timeout=60)
    for losses, expected in zip(found, ranks(2).run(_teacher, "sp=2", False, timeout=60), strict=True):
        assert losses == pytest.approx(expected, rel=1e-12)


def _switched(how: str) -> None:
    from hf_veomni import prepare_omni, run_pair

    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model: Any = prepare_omni(get_peft_model(build_model("llama"), lora), "sp=2,overlap=pairs")

    def compute(batch: dict[str, Tensor]) -> Tensor:
        loss = model(**batch).loss
        with model.disable_adapter() if how == "adapter" else torch.inference_mode(how == "inference"):
            if how == "eval":
                model.eval()
            model(**batch)
        return loss

    run_pair(compute, packed_batch((9, 5)), packed_batch((20, 8)))


@pytest.mark.parametrize("how", ["adapter", "inference", "eval"])
def test_a_model_that_is_switched_under_the_other_sequence_is_refused(ranks, how: str) -> None:
    """The other one would go on with the adapters off, say, which nobody would see."""
    ranks(2).raises(_switched, how, match="Llama.* was switched from .*`overlap`.*reference model of its own")


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_adapters_that_trl_switches_off_are_refused(ranks, tmp_path, kind: str) -> None:
    pytest.importorskip("trl", reason="needs the extra `trl`")
    from tests.ranks.trl_runs import omni_trainer

    case = kind, "sp=2,overlap=pairs", str(tmp_path), "lora"
    ranks(2).raises(omni_trainer, *case, match="`overlap`.*cannot be combined with adapters in TRL's " + kind)


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_trl_with_a_reference_model_logs_what_it_logs_without_overlap(ranks, tmp_path, kind: str) -> None:
    pytest.importorskip("trl", reason="needs the extra `trl`")
    from tests.ranks.trl_runs import assert_same_logs, omni

    expected = ranks(2).run(omni, kind, "sp=2", str(tmp_path / "plain"), "dense", timeout=120)
    found = ranks(2).run(omni, kind, "sp=2,overlap=pairs", str(tmp_path / "pairs"), "dense", timeout=120)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same_logs(mine, theirs)
