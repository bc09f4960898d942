"""A script of the stock Trainer runs under `pp=2`, whatever it trains, and what it saves opens in plain libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Trainer, TrainingArguments

from tests.models import build_model
from tests.multimodal import samples_of
from tests.ranks.pipeline.test_encoders import ROWS, _build
from tests.ranks.training import PlainRows, Run, adapt_experts, collate, relative, tiny_mixtral

SLOW = pytest.mark.slow
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}


def _script(kind: str) -> tuple[Any, dict[str, Any]]:
    """The model, and what else a trainer is given: the same on ranks and in one process."""
    if kind == "experts with adapters":
        model: Any = adapt_experts(tiny_mixtral(num_hidden_layers=4))
    elif kind == "hybrid":
        model = build_model("qwen3_next", **HYBRID)
    else:
        model, processor = _build("qwen3_vl")
        samples = [samples_of("qwen3_vl")[i] for row in ROWS for i in row]
        return model, {"train_dataset": samples, "data_collator": _Samples(processor, model.config)}
    return model, {"train_dataset": PlainRows(6), "data_collator": collate}


class _Samples:
    """A batch of one sample with its images."""

    def __init__(self, processor: Any, config: Any) -> None:
        from hf_veomni import OmniDataCollatorWithPacking

        self.pack = OmniDataCollatorWithPacking(processor=processor, model_config=config)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.pack(samples)
        return {name: value for name, value in batch.items() if name != "position_ids"}  # one document


def _arguments(kind: str, folder: str, **more: Any) -> dict[str, Any]:
    given = {"gradient_accumulation_steps": 3, "output_dir": folder, "remove_unused_columns": False}
    if kind == "hybrid":
        given["max_steps"] = 1  # as in test_parity: its rounding in fp32 grows, in one process too
    return Run(arguments=given).all_arguments(include_num_input_tokens_seen=False, **more)


def _losses(trainer: Trainer) -> list[float]:
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [entry[name] for entry in steps for name in ("loss", "grad_norm")]


def _train(kind: str, folder: str) -> list[float]:
    from hf_veomni import OmniTrainer, OmniTrainingArguments

    model, given = _script(kind)
    trainer = OmniTrainer(model, OmniTrainingArguments(**_arguments(kind, folder, plan="pp=2")), **given)
    trainer.train()
    trainer.save_model(f"{folder}/saved")
    return _losses(trainer)


def _open(kind: str, folder: Path) -> Any:
    if kind == "experts with adapters":
        return PeftModel.from_pretrained(tiny_mixtral(num_hidden_layers=4), folder)
    auto = AutoModelForCausalLM if kind == "hybrid" else AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "kind", [pytest.param("experts with adapters", marks=SLOW), pytest.param("hybrid", marks=SLOW), "pictures"]
)
def test_losses_and_the_saved_model_are_those_of_one_process(ranks, tmp_path: Path, kind: str) -> None:
    model, given = _script(kind)
    stock = Trainer(model, TrainingArguments(**_arguments(kind, str(tmp_path / "stock"))), **given)
    stock.train()
    expected = _losses(stock)
    assert len(expected) == 2 * stock.state.max_steps > 0
    for found in ranks(2).run(_train, kind, str(tmp_path), timeout=120):
        assert relative(found, expected) < 1e-5
    saved, trained = dict(_open(kind, tmp_path / "saved").named_parameters()), dict(model.named_parameters())
    assert saved.keys() == trained.keys()
    for name, parameter in trained.items():
        assert (saved[name] - parameter).abs().max() < 1e-5, name
