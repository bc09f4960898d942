"""`class MySFT(OmniTrainerMixin, SFTTrainer)` on ranks trains as TRL's SFTTrainer does in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from datasets import Dataset

from tests.ranks.training import Run, lora_model, relative, tiny_model, word_tokenizer

pytest.importorskip("trl", reason="needs the extra `trl`")


_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} t2"
    "{% endgeneration %}{% else %}t3 {{ message['content'] }} {% endif %}{% endfor %}"
)


def _halves(row: dict[str, Any]) -> dict[str, Any]:
    """A prompt and its completion."""
    words = [f"t{token}" for token in row["input_ids"]]
    return {"prompt": " ".join(words[:3]), "completion": " " + " ".join(words[3:] or ["t5"])}


def _turns(row: dict[str, Any]) -> dict[str, Any]:
    """Two turns of a user and two answers."""
    words = [f"t{token}" for token in row["input_ids"]]
    parts = [" ".join(words[place::4] or ["t5"]) for place in range(4)]
    roles = ["user", "assistant"] * 2
    return {"messages": [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]}


def _options(folder: str, lora: bool, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments, and the rest of a trainer."""
    rows = Run(plain=True).dataset(12, 0)
    data = Dataset.from_list([{"input_ids": rows[index]["input_ids"]} for index in range(12)])
    tokenizer = word_tokenizer()
    if more.get("completion_only_loss"):
        data = data.map(_halves, remove_columns="input_ids")
    if more.get("assistant_only_loss"):
        data = data.map(_turns, remove_columns="input_ids")
        tokenizer.chat_template = _TEMPLATE
    arguments = Run().all_arguments(output_dir=folder, max_steps=4, per_device_train_batch_size=2)
    arguments |= {"per_device_eval_batch_size": 5}  # all rows in one batch
    arguments |= {"max_length": 32, "bf16": False, "activation_checkpointing": False, **more}
    options = {"train_dataset": data, "eval_dataset": data.select(range(5)), "processing_class": tokenizer}
    options["model"] = lora_model() if lora else tiny_model()
    return arguments, options


def _trained(trainer: Any) -> tuple[list[float], list[float], float]:
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    loss = trainer.evaluate()["eval_loss"]
    return [entry["loss"] for entry in steps], [entry["grad_norm"] for entry in steps], loss


def _omni_trainer(plan: str, folder: str, lora: bool, **more: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    from hf_veomni import OmniTrainerMixin, OmniTrainingArguments

    config = dataclass(type("Config", (OmniTrainingArguments, SFTConfig), {}))
    trainer = type("MySFT", (OmniTrainerMixin, SFTTrainer), {})
    arguments, options = _options(folder, lora, **more)
    return trainer(args=config(**arguments, plan=plan), **options)


def _omni(plan: str, folder: str, lora: bool, **more: Any) -> tuple[list[float], list[float], float]:
    return _trained(_omni_trainer(plan, folder, lora, **more))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"packing": True},
        {"padding_free": True, "max_length": None},
        {"completion_only_loss": True},
        {"assistant_only_loss": True},
    ],
    ids=repr,
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sft_under_sp_equals_one_process(ranks, tmp_path, more, lora):
    from trl import SFTConfig, SFTTrainer

    arguments, options = _options(str(tmp_path / "stock"), lora, **more)
    expected = _trained(SFTTrainer(args=SFTConfig(**arguments), **options))
    for found in ranks(2).run(_omni, "sp=2", str(tmp_path / "omni"), lora, **more, timeout=90):
        assert relative(found[0], expected[0]) < 1e-5
        assert relative(found[1], expected[1]) < 1e-5
        assert found[2] == pytest.approx(expected[2], rel=1e-5)


def _samples(plan: str, folder: str) -> None:
    from trl import RLOOConfig, RLOOTrainer

    from hf_veomni import OmniTrainerMixin, OmniTrainingArguments

    config = dataclass(type("Config", (OmniTrainingArguments, RLOOConfig), {}))
    trainer = type("MyRLOO", (OmniTrainerMixin, RLOOTrainer), {})
    arguments = Run().all_arguments(output_dir=folder, bf16=False, plan=plan, per_device_train_batch_size=4)
    trainer(model=tiny_model(), args=config(**arguments), reward_funcs=[])


def test_trainers_that_sample_are_refused(ranks, tmp_path):
    said = "RLOOTrainer of TRL cannot be combined with the plan .* samples answers"
    ranks(2).raises(_samples, "sp=2", str(tmp_path), match=said, timeout=60)
