"""`class MyDPO(OmniTrainerMixin, DPOTrainer)` on ranks trains as TRL's DPOTrainer does in one process."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.ranks.training import VOCABULARY, Run, relative, tiny_model, word_tokenizer

pytest.importorskip("trl", reason="needs the extra `trl`")


def _preferences(count: int) -> Dataset:
    """Prompts and two answers of uneven lengths."""
    draw = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(f"t{draw.randrange(3, VOCABULARY)}" for _ in range(draw.randrange(low, high)))

    return Dataset.from_list(
        [{"prompt": words(2, 9), "chosen": words(1, 8), "rejected": words(1, 12)} for _ in range(count)]
    )


def _adapted() -> nn.Module:
    model: Any = get_peft_model(tiny_model(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return model


def _options(folder: str, kind: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = _preferences(12)
    arguments = Run().all_arguments(output_dir=folder, max_steps=4, per_device_train_batch_size=2)
    arguments |= {"bf16": False, "activation_checkpointing": False, "max_length": 17, "beta": 0.5, **more}
    options: dict[str, Any] = {"train_dataset": rows, "eval_dataset": rows.select(range(4))}
    options |= {"processing_class": word_tokenizer(), "model": _adapted() if kind == "lora" else tiny_model()}
    if kind == "full":
        options["ref_model"] = tiny_model(seed=2)
    return arguments, options


def _trained(trainer: Any) -> dict[str, list[float]]:
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    found = {name: [entry[name] for entry in steps] for name in ("loss", "grad_norm", "logps/chosen", "entropy")}
    return found | {"eval": [trainer.evaluate()["eval_loss"]]}


def _omni_trainer(plan: str, folder: str, kind: str, **more: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    from hf_veomni import OmniTrainerMixin, OmniTrainingArguments

    config = dataclass(type("Config", (OmniTrainingArguments, DPOConfig), {}))
    trainer = type("MyDPO", (OmniTrainerMixin, DPOTrainer), {})
    arguments, options = _options(folder, kind, **more)
    return trainer(args=config(**arguments, plan=plan), **options)


def _omni(plan: str, folder: str, kind: str, **more: Any) -> dict[str, list[float]]:
    return _trained(_omni_trainer(plan, folder, kind, **more))


@pytest.mark.parametrize(
    ("plan", "kind", "more"),
    [
        ("sp=2", "full", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        ("sp=2", "lora", {}),
        ("sp=1", "full", {}),
    ],
)
def test_dpo_on_two_ranks_equals_one_process(ranks, tmp_path, plan, kind, more):
    from trl import DPOConfig, DPOTrainer

    # Two data ranks take one pair each where one process takes two.
    split = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1} if plan == "sp=1" else {}
    arguments, options = _options(str(tmp_path / "stock"), kind, **more)
    expected = _trained(DPOTrainer(args=DPOConfig(**arguments), **options))
    for found in ranks(2).run(_omni, plan, str(tmp_path / "omni"), kind, **more, **split, timeout=120):
        for name, values in expected.items():
            assert relative(found[name], values) < 1e-5, name


@pytest.mark.parametrize("name", ["precompute_ref_log_probs", "sync_ref_model"])
def test_what_reads_whole_parameters_is_refused(ranks, tmp_path, name):
    match = f"`{name}` .True. .* Leave it out"
    ranks(2).raises(_omni_trainer, "sp=2", str(tmp_path), "full", **{name: True}, match=match, timeout=60)


def test_a_prepared_adapter_has_no_reference(ranks, tmp_path):
    ranks(2).raises(_prepared, str(tmp_path), match="prepared already.*before `prepare_omni`", timeout=60)


def _prepared(folder: str) -> None:
    from trl import DPOConfig, DPOTrainer

    from hf_veomni import OmniTrainerMixin, OmniTrainingArguments, prepare_omni

    config = dataclass(type("Config", (OmniTrainingArguments, DPOConfig), {}))
    arguments, options = _options(folder, "lora")
    options["model"] = prepare_omni(options["model"], "sp=2")
    type("MyDPO", (OmniTrainerMixin, DPOTrainer), {})(args=config(**arguments, plan="sp=2"), **options)
