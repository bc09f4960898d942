"""Classes of users around the mixin, in one process: what they override and pass means what it means in stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from hf_veomni import OmniTrainer, OmniTrainerMixin, OmniTrainingArguments, detach_omni, prepare_omni
from hf_veomni.trainer.trl import cut_fused_head

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))


def make_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4, output_router_logits=True))


def make_rows() -> Dataset:
    rows = [list(range(1, length)) for length in (7, 5, 12, 4)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def make_arguments(kind: type, folder: Path, **more: Any) -> Any:
    arguments = {"per_device_train_batch_size": 1, "max_steps": 1, "logging_steps": 1, "learning_rate": 0.0, **more}
    return kind(str(folder), report_to="none", save_strategy="no", use_cpu=True, **arguments)


def logged(trainer: Any) -> tuple[float, float]:
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return entry["loss"], entry["grad_norm"]


class Named(Trainer):
    """With a constructor of its own that does not name all arguments."""

    def __init__(self, model: Any = None, args: Any = None, extra: int = 0, **kwargs: Any) -> None:
        super().__init__(model=model, args=args, **kwargs)


class OmniNamed(OmniTrainerMixin, Named):
    pass


def test_adapters_reach_a_trainer_behind_a_constructor_of_ones_own(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj"])
    arguments = make_arguments(OmniTrainingArguments, tmp_path)
    assert isinstance(OmniNamed(make_model(), arguments, train_dataset=make_rows(), peft_config=lora).model, PeftModel)


class OwnStep(Trainer):
    """A `training_step` that leaves the scale to `compute_loss`, right in stock for losses that count items."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), False, num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class OmniOwnStep(OmniTrainerMixin, OwnStep):
    pass


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_training_step_behind_the_mixin_sees_losses_that_are_scaled(tmp_path: Path, accumulation: int) -> None:
    options = {"gradient_accumulation_steps": accumulation}
    stock = OwnStep(make_model(), make_arguments(TrainingArguments, tmp_path, **options), train_dataset=make_rows())
    omni = OmniOwnStep(
        make_model(), make_arguments(OmniTrainingArguments, tmp_path, **options), train_dataset=make_rows()
    )
    assert logged(omni) == pytest.approx(logged(stock), rel=1e-5)


class Penalty(Trainer):
    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        return loss + 100, logits, labels


def test_a_loss_that_prediction_step_changes_is_logged(tmp_path: Path) -> None:
    class Ours(OmniTrainer):
        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            loss, logits, labels = super().prediction_step(*args, **kwargs)
            return loss + 100, logits, labels

    options = {"per_device_eval_batch_size": 1}
    stock = Penalty(make_model(), make_arguments(TrainingArguments, tmp_path, **options), eval_dataset=make_rows())
    omni = Ours(make_model(), make_arguments(OmniTrainingArguments, tmp_path, **options), eval_dataset=make_rows())
    assert omni.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)


def test_labels_are_smoothed_in_the_model_of_model_init_too(tmp_path: Path) -> None:
    options = {"label_smoothing_factor": 0.3}
    stock = Trainer(make_model(), make_arguments(TrainingArguments, tmp_path, **options), train_dataset=make_rows())
    arguments = make_arguments(OmniTrainingArguments, tmp_path, **options)
    omni = OmniTrainer(model_init=make_model, args=arguments, train_dataset=make_rows())
    assert logged(omni)[0] == pytest.approx(logged(stock)[0], rel=1e-4)


def test_the_fused_head_leaves_nothing_behind() -> None:
    ids = torch.arange(8)[None] % 64
    expected = make_mixtral()(input_ids=ids, labels=ids).loss
    model = prepare_omni(make_mixtral(), "")
    hooks = {name: len(vars(model)[name]) for name in ("_forward_pre_hooks", "_forward_hooks")}
    cut_fused_head(model)
    model(input_ids=ids, labels=ids)
    assert make_mixtral()(input_ids=ids, labels=ids).loss.equal(expected)  # another model, meanwhile
    assert any(len(vars(model)[name]) > count for name, count in hooks.items())
    detach_omni(model)
    assert not model._forward_pre_hooks and not model._forward_hooks and not hasattr(model, "_omni_fused_head")
    assert model(input_ids=ids, labels=ids).loss.equal(expected)


@pytest.mark.parametrize("trained", [False, True])
def test_evaluation_of_a_mixture_under_trl_is_not_divided_by_accumulation(tmp_path: Path, trained: bool) -> None:
    trl = pytest.importorskip("trl")
    from tests.ranks.trl_runs import omni_trainer, options

    more = {"gradient_accumulation_steps": 2, "router_aux_loss_coef": 1.0, "learning_rate": 0.0}
    arguments, features = options("SFT", str(tmp_path / "stock"), "mixtral", **more)
    found = []
    for trainer in (
        trl.SFTTrainer(args=trl.SFTConfig(**arguments), **features),
        omni_trainer("SFT", None, str(tmp_path / "omni"), "mixtral", **more),
    ):
        if trained:
            trainer.train()
        found.append(trainer.evaluate()["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


class _Scores(OmniTrainer):
    """Trains a language model's last logits towards a number a row."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = inputs.pop("labels")
        return (model(**inputs).logits[:, -1].float().mean(-1) - wanted).square().mean()


def test_labels_of_a_loss_of_ones_own_mean_what_that_says(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": 0.5}, {"input_ids": [4, 5, 6], "labels": 70.0}])
    trainer = _Scores(make_model(), make_arguments(OmniTrainingArguments, tmp_path), train_dataset=rows)
    assert logged(trainer)[0] > 0
