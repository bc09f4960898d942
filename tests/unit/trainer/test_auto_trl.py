"""`plan="auto"` counts rows as TRL makes them, and refuses weights and optimizers that the formulas do not have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import BitsAndBytesConfig, Trainer

from hf_veomni import OmniTrainer, OmniTrainerMixin, OmniTrainingArguments, UnsupportedError
from hf_veomni.trainer import auto
from tests.ranks.training import tiny_mixtral, tiny_model, word_tokenizer

LENGTHS = (30, 7, 50, 20, 9)


def make_rows() -> Dataset:
    rows = [[3] * length for length in LENGTHS]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def make_arguments(folder: Path, *bases: type, **options: Any) -> Any:
    kind: Any = dataclass(type("Arguments", (OmniTrainingArguments, *bases), {})) if bases else OmniTrainingArguments
    given = {"per_device_train_batch_size": 1, "report_to": [], "use_cpu": True, "bf16": True, **options}
    return kind(str(folder), plan="auto:h100-80gb", **given)


def make_sft(folder: Path, model: Any = None, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    kind = type("SFT", (OmniTrainerMixin, SFTTrainer), {})
    loads = {"quantization_config": options.pop("quantization_config", None)}
    arguments = make_arguments(folder, SFTConfig, **options)
    model = model or tiny_model().to(torch.bfloat16)
    return kind(model, arguments, train_dataset=make_rows(), processing_class=word_tokenizer(), **loads)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the planner is asked for."""
    found: dict[str, Any] = {}
    stock = auto.plan_layouts

    def note(*args: Any, **kwargs: Any) -> Any:
        found.update(kwargs)
        return stock(*args, **kwargs)

    monkeypatch.setattr(auto, "plan_layouts", note)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": None},
        {"max_length": 24},
        {"max_length": 24, "dataset_kwargs": {"skip_prepare_dataset": True}},
        {"max_length": 59, "packing": True},  # of 50 and 9; rows that are filled less count as full
        {"max_length": 24, "packing": True, "per_device_train_batch_size": 2},
        {"max_length": 40, "packing": True, "packing_strategy": "wrapped"},
        {"max_length": 1024, "packing": True},  # more than there is
    ],
    ids=str,
)
def test_counts_the_rows_that_trl_makes(tmp_path: Path, planned: dict[str, Any], options: dict[str, Any]) -> None:
    rows = make_sft(tmp_path, **options).train_dataset
    longest = max(len(row) for row in rows["input_ids"])
    packed = "seq_lengths" in rows.column_names
    documents = rows["seq_lengths"] if packed else [[len(row)] for row in rows["input_ids"]]
    assert planned["context"] == longest * options.get("per_device_train_batch_size", 1)
    assert planned["document"] == max(max(lengths) for lengths in documents)


def test_refuses_a_loss_of_pairs(tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    kind = type("DPO", (OmniTrainerMixin, DPOTrainer), {})
    arguments = make_arguments(tmp_path, DPOConfig)
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "length": 3}])
    with pytest.raises(UnsupportedError, match="`plan` .*TRL's DPOTrainer has another one.*name a plan"):
        kind(tiny_model().to(torch.bfloat16), args=arguments, train_dataset=rows, processing_class=word_tokenizer())


def quantized_by_config() -> nn.Module:
    model: Any = tiny_model().to(torch.bfloat16)
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    return model


def quantized_weights() -> nn.Module:
    model: Any = tiny_model().to(torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return model


class OwnParameter(nn.Parameter):
    """As bitsandbytes and torchao have them."""


def weights_of_a_class_of_their_own() -> nn.Module:
    model: Any = tiny_model().to(torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = OwnParameter(layer.weight.detach())
    return model


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (quantized_by_config, "BitsAndBytesConfig"),
        (quantized_weights, "torch.int8"),
        (weights_of_a_class_of_their_own, "OwnParameter"),
    ],
)
def test_refuses_quantized_weights(tmp_path: Path, build: Any, named: str) -> None:
    with pytest.raises(UnsupportedError, match=f"`plan` .*quantized .{named}.: name a plan, or load it without"):
        OmniTrainer(build(), make_arguments(tmp_path), train_dataset=make_rows())


def test_refuses_experts_in_fp32_on_a_rank_alone(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="fp32.*experts in fp32 on a rank alone.*load the weights in bf16"):
        OmniTrainer(tiny_mixtral(), make_arguments(tmp_path, token_budget=64), train_dataset=make_rows())


@pytest.mark.parametrize("by", ["argument", "model_init_kwargs"])
def test_refuses_weights_that_trl_would_quantize(tmp_path: Path, by: str) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    wanted = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    options: dict[str, Any] = wanted if by == "argument" else {"model_init_kwargs": wanted}
    with pytest.raises(UnsupportedError, match="`plan` .*quantized .BitsAndBytesConfig.: name a plan"):
        make_sft(tmp_path / "run", str(tmp_path / "model"), **options)


class OwnOptimizer(OmniTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


class OwnChoice(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        return torch.optim.SGD, {"lr": 0.1}


class OmniOwnChoice(OmniTrainerMixin, OwnChoice):
    pass


@pytest.mark.parametrize(
    ("kind", "named"),
    [(OwnOptimizer, "OwnOptimizer has a `create_optimizer`"), (OmniOwnChoice, "OwnChoice has a `get_optimizer_cls_")],
)
def test_refuses_an_optimizer_of_a_subclass(tmp_path: Path, kind: Any, named: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'adamw_torch_fused' by `optim`, and {named}.*name a plan, or leave"):
        kind(tiny_model().to(torch.bfloat16), make_arguments(tmp_path), train_dataset=make_rows())


def test_takes_a_subclass_that_leaves_the_optimizer(tmp_path: Path) -> None:
    kind = type("Own", (OmniTrainer,), {"compute_loss": lambda self, *args, **kwargs: 0})
    trainer = kind(tiny_model().to(torch.bfloat16), make_arguments(tmp_path), train_dataset=make_rows())
    assert str(trainer.args.plan) == "single"
