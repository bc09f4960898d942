"""OmniTrainer in one process on whatever the stock Trainer takes, and the arguments and models of TRL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_veomni.data import OmniDataCollatorWithPacking
from hf_veomni.plan import ParallelPlan
from hf_veomni.trainer import OmniTrainer, OmniTrainerMixin, OmniTrainingArguments
from tests.checkpoints import make_llama

_SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)


class Line(nn.Module):
    """A plain module, which returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = input_ids * self.slope + self.shift
        return {"loss": (scores - labels).square().mean() / 1e4, "logits": scores} if labels is not None else {}


class Bare(Line):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        found = super().forward(input_ids, labels)
        return found["loss"], found["logits"]


def _prompted() -> Any:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)  # type: ignore[arg-type]
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**_SIZES)), config)


_T5 = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
_T5.decoder_start_token_id = 0
_BERT = BertConfig(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_SIZES)

MODELS: dict[str, Callable[[], Any]] = {
    "plain": Line,
    "plain tuple": Bare,
    "prompt tuning": _prompted,
    "classification": lambda: BertForSequenceClassification(_BERT),
    "masked LM": lambda: BertForMaskedLM(_BERT),
    "T5": lambda: T5ForConditionalGeneration(_T5),
}


def _rows(name: str, count: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 60, (9,), generator=draw) for _ in range(count)]
    return [{"input_ids": x, "labels": place % 3 if name == "classification" else x} for place, x in enumerate(ids)]


class Stream(IterableDataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def _run(trainer: Any, kind: Any, folder: str, name: str, evaluated: Any, **more: Any) -> list[dict[str, float]]:
    torch.manual_seed(0)
    values = dict(output_dir=folder, max_steps=4, logging_steps=1, use_cpu=True, report_to=[], save_steps=2)
    values |= dict(per_device_train_batch_size=2, per_device_eval_batch_size=4, disable_tqdm=True) | more
    made = trainer(MODELS[name](), kind(**values), train_dataset=_rows(name, 12), eval_dataset=evaluated)
    made.train()
    torch.manual_seed(0)
    made = trainer(MODELS[name](), kind(**values), train_dataset=_rows(name, 12), eval_dataset=evaluated)
    made.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    made.evaluate()
    kept = ("loss", "grad_norm", "eval_loss", "train_loss")
    return [{key: entry[key] for key in kept if key in entry} for entry in made.state.log_history]


def _same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [entry.keys() for entry in found] == [entry.keys() for entry in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_trains_resumes_and_evaluates_as_the_stock_trainer(tmp_path, name):
    evaluated = _rows(name, 8)
    expected = _run(Trainer, TrainingArguments, str(tmp_path / "stock"), name, evaluated)
    assert "eval_loss" in expected[-1]
    _same(_run(OmniTrainer, OmniTrainingArguments, str(tmp_path / "omni"), name, evaluated), expected)


def _by_hand(trainer: Any, kind: Any, folder: str, name: str) -> list[float]:
    torch.manual_seed(0)
    made = trainer(MODELS[name](), kind(folder, use_cpu=True, report_to=[]), train_dataset=_rows(name, 4))
    made.current_gradient_accumulation_steps = 1  # which the stock loop sets
    batch = next(iter(made.get_train_dataloader()))
    return [
        float(made.training_step(made.model, batch, torch.tensor(32))),
        float(made.prediction_step(made.model, batch, prediction_loss_only=True)[0]),
        float(made.prediction_step(made.model, batch, prediction_loss_only=False)[0]),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_steps_that_are_called_by_hand(tmp_path, name):
    expected = _by_hand(Trainer, TrainingArguments, str(tmp_path), name)
    assert _by_hand(OmniTrainer, OmniTrainingArguments, str(tmp_path), name) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_resumes_whatever_the_optimizer_keeps(tmp_path, optimizer):
    evaluated = _rows("masked LM", 8)
    expected = _run(Trainer, TrainingArguments, str(tmp_path / "a"), "masked LM", evaluated, optim=optimizer)
    found = _run(OmniTrainer, OmniTrainingArguments, str(tmp_path / "b"), "masked LM", evaluated, optim=optimizer)
    _same(found, expected)


@pytest.mark.parametrize("name", ["plain", "classification", "masked LM"])
def test_a_short_last_batch_of_a_stream_counts_by_its_rows(tmp_path, name):
    """Where a loss counts no items: each batch by its rows, of which the last has one."""
    evaluated = Stream(_rows(name, 9))
    expected = _run(Trainer, TrainingArguments, str(tmp_path / "stock"), name, evaluated)
    _same(_run(OmniTrainer, OmniTrainingArguments, str(tmp_path / "omni"), name, evaluated), expected)


def test_rules_of_a_plan_need_a_transformers_model(tmp_path):
    plan = ParallelPlan(modules={"slope": {"fsdp": "keep"}})
    with pytest.raises(ValueError, match="must be a transformers PreTrainedModel"):
        OmniTrainer(Line(), OmniTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], plan=plan))


@pytest.mark.parametrize("name", ["plain", "prompt tuning"])
def test_packed_rows_need_a_prepared_model(tmp_path, name):
    args = OmniTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="`data_collator` packs rows, .* Use a collator that pads"):
        OmniTrainer(MODELS[name](), args, data_collator=OmniDataCollatorWithPacking(max_tokens=16))


CONFIGS = ["SFTConfig", "DPOConfig", "RewardConfig", "KTOConfig", "GRPOConfig", "RLOOConfig"]


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "theirs first"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_a_trl_config_keeps_its_default(tmp_path, name, first):
    trl = pytest.importorskip("trl", reason="needs the extra `trl`")
    stock = getattr(trl, name)
    bases = (OmniTrainingArguments, stock) if first else (stock, OmniTrainingArguments)
    values: dict[str, Any] = dict(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    found, expected = dataclass(type("Arguments", bases, {}))(**values), stock(**values)
    expected.accelerator_config.dispatch_batches = False  # ours: a stream's rows may be packed
    for each in fields(expected):
        assert getattr(found, each.name) == getattr(expected, each.name), each.name
    assert found.plan.world_size == 1


def test_own_defaults_and_a_missing_decorator(tmp_path):
    @dataclass
    class Theirs(TrainingArguments):
        learning_rate: float = 0.5
        extra: int = 3
        label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "theirs"})

    @dataclass
    class Mine(OmniTrainingArguments, Theirs):
        warmup_steps: float = 7

    made = Mine(str(tmp_path), use_cpu=True, report_to=[])
    assert (made.learning_rate, made.extra, made.warmup_steps, made.weight_decay) == (0.5, 3, 7, 0.0)
    assert made.label_names == ["labels"]
    assert next(f for f in fields(made) if f.name == "label_names").metadata["help"] == "theirs"
    with pytest.raises(ValueError, match="put `@dataclass` before the class"):
        type("Bad", (OmniTrainingArguments, Theirs), {})(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_a_named_model_is_loaded_by_the_trainer_behind(tmp_path, dtype):
    trl = pytest.importorskip("trl", reason="needs the extra `trl`")
    from tests.ranks.training import tiny_model, word_tokenizer

    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    config = dataclass(type("Arguments", (OmniTrainingArguments, trl.RewardConfig), {}))
    kwargs = None if dtype is None else {"dtype": dtype}
    args = config(str(tmp_path), use_cpu=True, report_to=[], model_init_kwargs=kwargs, bf16=False)
    rows = Dataset.from_list([{"chosen": "t5 t6", "rejected": "t7"}] * 4)
    trainer = type("Mine", (OmniTrainerMixin, trl.RewardTrainer), {})(
        str(tmp_path / "model"), args, train_dataset=rows
    )
    assert type(trainer.model).__name__ == "LlamaForSequenceClassification" and trainer.model.config.num_labels == 1
    assert trainer.model.dtype == getattr(torch, dtype or "float32")  # TRL's default, not the checkpoint's


def test_a_trainer_of_trl_asks_for_its_arguments():
    trl = pytest.importorskip("trl", reason="needs the extra `trl`")
    with pytest.raises(ValueError, match="`args` .None. of Mine must be a dataclass .* of TRL's SFT"):
        type("Mine", (OmniTrainerMixin, trl.SFTTrainer), {})("model")


def test_arguments_of_the_trainer_behind_are_named(tmp_path):
    trl = pytest.importorskip("trl", reason="needs the extra `trl`")
    arguments = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match=r"`args` .SFTConfig. .*class Arguments.OmniTrainingArguments, SFTConfig"):
        type("Mine", (OmniTrainerMixin, trl.SFTTrainer), {})("model", arguments)


def test_the_mixin_comes_first():
    with pytest.raises(TypeError, match=r"class Mine.Trainer, OmniTrainerMixin.: OmniTrainerMixin must come before"):
        type("Mine", (Trainer, OmniTrainerMixin), {})


@pytest.mark.slow
def test_grpo_in_one_process_logs_what_trl_logs(tmp_path):
    """Over several ranks it is refused (docs/trainer.md); alone it samples, scores and trains as without the mixin."""
    trl = pytest.importorskip("trl", reason="needs the extra `trl`")
    folder = str(make_llama(tmp_path / "model"))
    logs = []
    for arguments, trainer in [
        (trl.GRPOConfig, trl.GRPOTrainer),
        (
            dataclass(type("Arguments", (OmniTrainingArguments, trl.GRPOConfig), {})),
            type("MyGRPO", (OmniTrainerMixin, trl.GRPOTrainer), {}),
        ),
    ]:
        sizes = {"max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 8}
        sizes["logging_steps"] = 1
        args = arguments(str(tmp_path), use_cpu=True, bf16=False, report_to=[], save_strategy="no", **sizes)
        prompts = Dataset.from_list([{"prompt": f"What is {n} + {n}?"} for n in range(8)])
        grpo = trainer(
            folder, lambda completions, **_: [float(len(c)) for c in completions], args, train_dataset=prompts
        )
        grpo.train()
        logs.append([(e["loss"], e["reward"], e["grad_norm"]) for e in grpo.state.log_history if "loss" in e])
    assert len(logs[0]) == 2 and logs[1] == logs[0]
